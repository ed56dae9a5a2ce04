"""The weights of one rank, cut out of those of the whole model while they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.parts.distributed.plan import VECTOR_BLOCK, OnFirstRank, ShardingPlan
from engine.parts.lora.checkpoint import LoraMatrices
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile
from engine.weights import Weight
from engine.weights.layout import EMBEDDING, HEAD
from engine.weights.packed import FLOAT8_BLOCK, PackedTensor, select_rows

logger = logging.getLogger("lightwell.engine")


def column_block(path: Path, config: ModelConfig) -> int:
    """Return the largest number of columns that a model's files pack together in blocks."""
    if path.is_dir():
        return FLOAT8_BLOCK if config.quantization is not None else VECTOR_BLOCK
    with GGUFFile(path) as file:
        return max(GGML_TYPES[tensor.ggml_type].block_size for tensor in file.tensors.values())


def shard(
    weights: Iterable[tuple[str, Weight]], plan: ShardingPlan, dtype: torch.dtype
) -> Iterator[tuple[str, Weight]]:
    """Yield the part of this rank of each weight.

    Packed columns that would be cut within a block are unpacked to `dtype`. A rank has the rows of the LM head for its
    part of the vocabulary, even if they are rows of the embedding too, which each rank has in full.
    """
    num_unpacked = 0
    for name, weight in weights:
        part = _part(name, weight, plan, dtype)
        num_unpacked += isinstance(part, Tensor) and not isinstance(weight, Tensor)
        yield name, part
        if name == EMBEDDING and plan.config.tie_word_embeddings:
            yield HEAD, _part(HEAD, weight, plan, dtype)
    if num_unpacked:
        logger.info("%d packed matrices are unpacked, because %d ranks cut their blocks", num_unpacked, plan.num_ranks)


def _part(name: str, weight: Weight, plan: ShardingPlan, dtype: torch.dtype) -> Weight:
    rule = plan.rule(name)
    if rule is None:
        return weight
    if isinstance(rule, OnFirstRank):
        assert isinstance(weight, Tensor)
        return weight if plan.rank == 0 else torch.zeros_like(weight)
    parts = plan.parts(name, rule.axis, weight.shape[rule.dim])
    part = parts[plan.rank]
    if rule.dim == 0:
        is_mapped = isinstance(weight, PackedTensor)
        return select_rows(weight, part if is_mapped else np.arange(part.start, part.stop))  # a view keeps the rest
    if isinstance(weight, Tensor):
        return weight[:, part].clone()
    if any(border % weight.column_block for some in parts for border in (some.start, some.stop)):
        return weight.dequantize(dtype)[:, part].clone()
    return weight.select_columns(part)


def shard_lora(name: str, matrices: LoraMatrices, plan: ShardingPlan) -> LoraMatrices:
    """Return the part of this rank of the update of a projection: rows of B, or columns of A."""
    rule = plan.rule(f"{name}.weight")
    if rule is None or isinstance(rule, OnFirstRank):
        return matrices
    a, b = matrices.a, matrices.b
    if rule.dim == 0:
        return LoraMatrices(a, b[plan.part(name, rule.axis, len(b))])
    return LoraMatrices(a[:, plan.part(name, rule.axis, a.shape[1])], b)
