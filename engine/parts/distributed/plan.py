"""The sharding plan: which parameters are divided among the ranks, and along what (Shoeybi et al. 2019).

What makes heads or the inner numbers of an MLP is divided by rows, and what reads them by columns: so the results of
`o_proj`, `down_proj` and the experts are parts of a sum. All else is the same on each rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.config import AttentionSpec, ExpertsSpec, LayerSpec, MLPSpec, ModelConfig
from engine.parts.lora.checkpoint import LoraMatrices
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile
from engine.weights import Weight
from engine.weights.layout import EMBEDDING, HEAD
from engine.weights.packed import FLOAT8_BLOCK, PackedTensor, select_rows

VECTOR_BLOCK = 32  # the smallest number of columns that all kernels like; blocks of most packed formats


class Axis(Enum):
    """What a dimension of a parameter counts, and hence where it may be cut."""

    HEADS = auto()  # of queries
    KV_HEADS = auto()  # if there are more ranks than these, several ranks have the same one
    WIDTH = auto()  # inner numbers of an MLP or of each expert: in whole blocks, so that parts may differ in size
    VOCABULARY = auto()


@dataclass(frozen=True)
class Split:
    dim: int  # 0: rows, which are outputs; 1: columns, which are inputs, or in biases of experts outputs
    axis: Axis


class OnFirstRank:
    """A bias of a sum, which is added once: it is zero on the other ranks."""


# Regular expression for names of the model -> how such a parameter is divided.
_MLP = r"\.mlp\.(shared_experts\.|experts\.\d+\.)?"
PLAN: Sequence[tuple[str, Split | OnFirstRank]] = (
    (r"lm_head\.weight", Split(0, Axis.VOCABULARY)),
    (r".*\.self_attn\.(q_proj|q_b_proj|k_b_proj|v_b_proj|sinks)\.(weight|bias)", Split(0, Axis.HEADS)),
    (r".*\.self_attn\.[kv]_proj\.(weight|bias)", Split(0, Axis.KV_HEADS)),
    (r".*\.self_attn\.o_proj\.weight", Split(1, Axis.HEADS)),
    (rf".*{_MLP}(gate|up)_proj\.weight", Split(0, Axis.WIDTH)),
    (r".*\.mlp\.(shared_experts\.)?(gate|up)_proj\.bias", Split(0, Axis.WIDTH)),
    (r".*\.mlp\.experts\.(gate|up)_proj\.bias", Split(1, Axis.WIDTH)),
    (rf".*{_MLP}down_proj\.weight", Split(1, Axis.WIDTH)),
    (r".*\.(o_proj|down_proj)\.bias", OnFirstRank()),
)
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ShardingPlan:
    """The part of one rank in a model.

    `config` is that of the whole model, and `column_block` the largest number of columns that its files pack together.
    """

    config: ModelConfig
    rank: int
    num_ranks: int
    column_block: int

    def rule(self, name: str) -> Split | OnFirstRank | None:
        """Return how a parameter is divided; None if it is not."""
        return next((rule for pattern, rule in PLAN if re.fullmatch(pattern, name)), None)

    def part(self, name: str, axis: Axis, size: int) -> slice:
        """Return the part of this rank in a dimension of a parameter."""
        return self.parts(name, axis, size)[self.rank]

    def parts(self, name: str, axis: Axis, size: int) -> list[slice]:
        """Return the parts of all ranks in a dimension of a parameter, of which `size` is the whole."""
        if axis is Axis.WIDTH:
            return self.width_parts(size)
        if axis is Axis.VOCABULARY:
            return divide(size, self.num_ranks, VECTOR_BLOCK)
        num_pieces = self.num_ranks
        if axis is Axis.KV_HEADS:
            match = LAYER.match(name)
            assert match is not None
            num_pieces = min(num_pieces, self.config.attentions[int(match[1])].num_kv_heads)
        piece = size // num_pieces
        numbers = [rank * num_pieces // self.num_ranks for rank in range(self.num_ranks)]
        return [slice(number * piece, (number + 1) * piece) for number in numbers]

    def width_parts(self, width: int) -> list[slice]:
        """Return the parts of all ranks in the width of an MLP.

        They are whole blocks of the files' formats if these are enough, so that packed weights stay packed.
        """
        blocks = (self.column_block, VECTOR_BLOCK, 1)
        block = next(block for block in blocks if width % block == 0 and width // block >= self.num_ranks)
        return divide(width, self.num_ranks, block)

    @property
    def vocabulary_sizes(self) -> list[int]:
        """The numbers of logits that the ranks compute."""
        return [_size(part) for part in divide(self.config.vocab_size, self.num_ranks, VECTOR_BLOCK)]

    def local_config(self) -> ModelConfig:
        """Return the shape of this rank's part, from which its decoder is built.

        It takes no matrix for the LM head, whose rows `parallelize` takes instead.
        """
        layers = tuple(self._local_layer(layer) for layer in self.config.layers)
        return msgspec.structs.replace(self.config, layers=layers, tie_word_embeddings=True)

    def _local_layer(self, layer: LayerSpec) -> LayerSpec:
        return msgspec.structs.replace(
            layer,
            attention=self._local_attention(layer.attention),
            mlp=self._local_mlp(layer.mlp),
            experts=self._local_experts(layer.experts),
        )

    def _local_attention(self, attention: AttentionSpec | None) -> AttentionSpec | None:
        return attention and msgspec.structs.replace(
            attention,
            num_heads=attention.num_heads // self.num_ranks,
            num_kv_heads=max(1, attention.num_kv_heads // self.num_ranks),
            qk_norm="none" if attention.qk_norm == "all" else attention.qk_norm,  # see `parallelize`
        )

    def _local_mlp(self, mlp: MLPSpec | None) -> MLPSpec | None:
        return None if mlp is None else msgspec.structs.replace(mlp, intermediate_size=self._width(mlp))

    def _local_experts(self, experts: ExpertsSpec | None) -> ExpertsSpec | None:
        if experts is None:
            return None
        shared = self._local_mlp(experts.shared)
        return msgspec.structs.replace(experts, intermediate_size=self._width(experts), shared=shared)

    def _width(self, spec: MLPSpec | ExpertsSpec) -> int:
        return _size(self.width_parts(spec.intermediate_size)[self.rank])


def divide(size: int, num_parts: int, block: int) -> list[slice]:
    """Cut `size` into parts of whole blocks that are as equal as they can be. The last block may be shorter."""
    num_blocks = -(-size // block)
    borders = [min(size, number * num_blocks // num_parts * block) for number in range(num_parts + 1)]
    return [slice(*pair) for pair in pairwise(borders)]


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size


def check_num_ranks(config: ModelConfig, num_ranks: int) -> None:
    """Raise ValueError, with the numbers that work, unless each layer divides among `num_ranks` ranks."""
    if config.mixers:
        raise ValueError(
            f"--tensor-parallel-size {num_ranks}: layers that have a state in place of attention are not divided"
        )
    attentions = set(config.attentions.values())
    if all(_divides(attention, num_ranks) for attention in attentions) and num_ranks <= _least_width(config):
        return
    most = min(_least_width(config), *(attention.num_heads for attention in attentions))
    working = [n for n in range(2, most + 1) if all(_divides(attention, n) for attention in attentions)]
    kinds = sorted({(attention.num_heads, attention.num_kv_heads) for attention in attentions})
    heads = " and of ".join(
        f"{num_heads} attention heads and {num_kv_heads} KV heads" for num_heads, num_kv_heads in kinds
    )
    raise ValueError(
        f"--tensor-parallel-size {num_ranks}: the model has layers of {heads}, "
        f"which {f'divide among {_listed(working)} ranks only' if working else 'do not divide'}"
    )


def _divides(attention: AttentionSpec, num_ranks: int) -> bool:
    """Return whether each rank gets as many heads as any other, and these share KV heads as all heads do.

    A norm of all heads at once needs each KV head once.
    """
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    repeats = num_ranks % num_kv_heads == 0 and attention.qk_norm != "all"
    return num_heads % num_ranks == 0 and (num_kv_heads % num_ranks == 0 or repeats)


def _least_width(config: ModelConfig) -> int:
    mlps = [layer.mlp for layer in config.layers] + [layer.experts and layer.experts.shared for layer in config.layers]
    specs: list[MLPSpec | ExpertsSpec | None] = [*mlps, *(layer.experts for layer in config.layers)]
    return min(spec.intermediate_size for spec in specs if spec is not None)


def _listed(numbers: Sequence[int]) -> str:
    return (
        " or ".join(map(str, numbers)) if len(numbers) < 3 else f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
    )


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
