"""The operations on a GPU: Triton kernels, and plain torch for embedding and gathering rows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.batch.transfer import to_device
from engine.config import AttentionKind, KVShape
from engine.kernels.interface import (
    AttentionScores,
    ExpertLinearOp,
    KernelOptions,
    LayerCache,
    LinearOp,
    check_attention,
)
from engine.kernels.torch import attention as torch_attention
from engine.kernels.torch.attention import cached_keys
from engine.kernels.torch.kernels import joined
from engine.kernels.torch.linear import adding
from engine.kernels.torch.rows import gate_rows
from engine.parts.triton import attention, experts, prompt_attention, rows
from engine.parts.triton.attention import TritonAttentionPlan
from engine.parts.triton.attention_plan import TritonAttentionPlanner, new_planner
from engine.parts.triton.linear import linear
from engine.parts.triton.packed_matrix import PACKED_TYPES, PackedMatrix, from_float8, from_ggml, from_groups, to_int8
from engine.parts.triton.sampler import TritonSampler
from engine.parts.triton.tiles import (
    EXPERTS_OF_ROW,
    SMALLEST,
    Tiles,
    card_name,
    compute_capability,
    num_multiprocessors,
    tiles_for,
)
from engine.weights import PackedTensor, Weight, concatenate, layout_of

logger = logging.getLogger("lightwell.engine")
FLOAT8_CAPABILITY = (8, 9)  # from which Triton has float8 e4m3

Matrix: TypeAlias = list[Tensor | PackedMatrix]  # stacked vertically


class TritonKernels:
    """Kernels in Triton, whose results for a row depend on no other row.

    Without batch invariance, products with plain weights and the attention of prompts use torch's libraries, which
    choose another order of additions for another number of rows. Products with packed weights stay the same.

    An 8-bit KV cache holds a scale for each token and head, and int8, or float8 e4m3, which is several times less
    precise with its mantissa of three bits. Cards from 8.9 on convert two numbers of float8 with one instruction.
    """

    separates_prompts = False

    def __init__(self, options: KernelOptions, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.dtype = self.vector_dtype = options.dtype
        self.name = f"triton {triton.__version__} {card_name(device)}"
        self.deterministic = options.batch_invariant
        self.num_threads = self.num_torch_threads = torch.get_num_threads()
        self.is_graphed = device.type == "cuda" and not options.enforce_eager
        self.keep_packed = PACKED_TYPES if options.quantization == "auto" else frozenset()
        capability = compute_capability(device)
        self.has_float8 = capability is not None and capability >= FLOAT8_CAPABILITY
        float8 = torch.float8_e4m3fn if self.has_float8 else torch.uint8  # its bits
        self.cache_dtype = {"int8": torch.int8, "fp8": float8}.get(options.kv_cache_dtype, options.dtype)
        self.kv_cache_bytes = partial(kv_cache_bytes, dtype=self.cache_dtype)
        self.new_kv_cache = partial(new_kv_cache, dtype=self.cache_dtype, device=device)
        self.new_sampler = partial(TritonSampler, device=device)
        self.has_scales = self.cache_dtype.itemsize == 1
        reason = prompt_attention.unsupported_reason(options, capability)
        self.uses_flash_attention = not options.batch_invariant and reason is None
        if not options.batch_invariant and reason is not None:
            logger.warning("torch's flash attention, which is faster for prompts, is not used: %s", reason)
        self.weight_formats: list[str] = []  # of the weights packed so far, in order
        self.tiles = tiles_for(capability, options.dtype)
        self.warm_up_rows = frozenset({2 * self.tiles.attention.segment + 1})  # with so many, attention splits the keys

    @property
    def formats(self) -> str:
        is_fp8 = self.options.kv_cache_dtype == "fp8"
        cache = "float8_e4m3fn" if is_fp8 else str(self.cache_dtype).removeprefix("torch.")
        return f"weights {', '.join(self.weight_formats)}, KV cache {cache}"

    def pack(self, weights: Sequence[Weight], dtype: torch.dtype | None = None) -> Matrix:
        """Successive weights of one type become one part. If one weight is not packed, all are dequantized."""
        if dtype is not None:
            return [joined(weights, dtype, self.device).to(dtype)]
        if any(isinstance(weight, Tensor) for weight in weights):
            weights = [joined(weights, self.dtype, self.device)]
        groups: list[list[Any]] = [list(group) for _, group in itertools.groupby(weights, key=layout_of)]
        return [self._pack_part(group[0] if len(group) == 1 else concatenate(group)) for group in groups]

    def _pack_part(self, weight: Weight) -> Tensor | PackedMatrix:
        is_int8 = self.options.quantization == "int8"
        plain_name = "int8" if is_int8 else str(self.dtype).removeprefix("torch.")
        name = plain_name if isinstance(weight, Tensor) else weight.type_name.lower()
        if name not in self.weight_formats:
            self.weight_formats.append(name)
        if isinstance(weight, PackedTensor):
            return from_ggml(weight, self.device)
        if not isinstance(weight, Tensor):
            codes: Any = weight  # of the part `quantized`
            if name == "float8":
                return from_float8(codes, self.device, is_native=self.has_float8)
            return from_groups(codes, self.device)
        return to_int8(weight) if is_int8 else weight

    def linear(self, matrix: Matrix, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        dtype = torch.float32 if is_float32 else self.dtype
        if not self.deterministic and len(matrix) == 1 and isinstance(weights := matrix[0], Tensor):
            same_bias = None if bias is None else bias.to(weights.dtype)
            return adding(lambda x: F.linear(x.to(weights.dtype), weights, same_bias).to(dtype))
        sizes = [len(part) for part in matrix]
        biases = [None] * len(matrix) if bias is None else torch.split(bias, sizes)
        tiles = [
            self._tiles_of(part).linear_for(*part.shape, is_packed=isinstance(part, PackedMatrix)) for part in matrix
        ]
        for some, size in zip(tiles, sizes, strict=True):
            self.warm_up_rows |= some.first_rows(size)

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            adds = residual is not None
            out = torch.empty((len(x), sum(sizes)), dtype=dtype, device=x.device) if residual is None else residual
            columns = torch.split(out, sizes, dim=1)
            for part, part_bias, part_tiles, part_columns in zip(matrix, biases, tiles, columns, strict=True):
                linear(x, part, part_bias, part_tiles, part_columns, adds=adds)
            return out

        return product

    def head_linear(self, matrices: Tensor) -> LinearOp:
        num_heads, num_outputs, num_inputs = matrices.shape
        tiles = self.tiles.grouped_for(num_heads * num_outputs, num_inputs, is_packed=False)
        self.warm_up_rows |= {first for first, _ in tiles.tiles}
        return experts.head_linear(matrices.to(self.device, self.dtype), tiles)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    def _tiles_of(self, weights: Tensor | PackedMatrix) -> Tiles:
        return SMALLEST if isinstance(weights, Tensor) and weights.dtype == torch.float32 else self.tiles

    def embed(self, token_ids: Tensor, matrix: Matrix, scale: float = 1.0) -> Tensor:
        (table,) = matrix
        out = F.embedding(token_ids, table) if isinstance(table, Tensor) else table.rows(token_ids, self.dtype)
        if scale != 1.0:
            rows.scale(out, scale)
        return out

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    rms_norm = staticmethod(rows.rms_norm)
    layer_norm = staticmethod(rows.layer_norm)
    add = staticmethod(rows.add)
    scale = staticmethod(rows.scale)
    act_and_mul = staticmethod(rows.act_and_mul)
    gate_rows = staticmethod(gate_rows)

    # Mixture of experts.

    def pack_experts(self, weights: Sequence[Sequence[Weight]]) -> experts.ExpertMatrices:
        """The weights of all experts are one matrix if they have one type, else one for each weight of an expert."""
        together = [weight for expert in weights for weight in expert]
        has_one_type = len({layout_of(weight) for weight in together}) == 1
        groups = [together] if has_one_type else list(zip(*weights, strict=True))
        parts = [self.pack(group) for group in groups]
        if any(len(part) != 1 for part in parts):  # experts have weights of several types
            parts = [[joined(group, self.dtype, self.device)] for group in groups]
        return experts.ExpertMatrices(len(weights), [part for (part,) in parts])

    route = staticmethod(experts.route)

    def expert_linear(self, matrices: experts.ExpertMatrices, bias: Tensor | None = None) -> ExpertLinearOp:
        tiles = [
            self._tiles_of(part).grouped_for(
                EXPERTS_OF_ROW * len(part) // matrices.num_experts,
                part.shape[1],
                is_packed=isinstance(part, PackedMatrix),
            )
            for part in matrices.parts
        ]
        for some in tiles:
            self.warm_up_rows |= experts.first_rows(some, matrices.num_experts)
        return experts.expert_linear(matrices, tiles, bias)

    combine_experts = staticmethod(experts.combine_experts)

    # Attention.

    cached_keys = staticmethod(cached_keys)
    rope_and_store_kv = staticmethod(rows.rope_and_store_kv)

    def attention_planner(self, kind: AttentionKind) -> TritonAttentionPlanner:
        sizes = self.tiles.attention_for(kind.head_dim)
        return new_planner(sizes, kind, num_multiprocessors(self.device) * sizes.programs)

    def plan_attention(
        self, batch: BatchInputs, query_lens: Lengths, kind: AttentionKind, kind_index: int
    ) -> TritonAttentionPlan:
        planner = self.attention_planner(kind)
        prompts = None
        if self.uses_flash_attention:
            prompts = prompt_attention.plan_prompts(batch, query_lens, kind, self.options.block_size, self.cache_dtype)
            query_lens = query_lens if prompts is None else query_lens[: prompts.first_sequence]
        if batch.attention_work and np.array_equal(query_lens, batch.query_lens):
            table, num_partial_rows = batch.attention_work[kind_index]
        else:
            work = planner.plan(query_lens, batch.seq_lens[: len(query_lens)])
            table, num_partial_rows = to_device(work.table, np.int64, self.device), work.num_partial_rows
        return TritonAttentionPlan(table, planner.num_programs, num_partial_rows, planner.part_size, kind, prompts)

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: TritonAttentionPlan, block_tables: Tensor, scores: AttentionScores
    ) -> Tensor:
        check_attention(q, cache, plan.kind, scores)
        sizes = self.tiles.attention_for(q.shape[2])
        out = attention.paged_attention(q.contiguous(), cache, plan, block_tables, scores, sizes)
        if plan.prompts is not None:
            prompt_attention.prompt_attention(out, cache, plan.prompts, block_tables, scores.scale)
        return out

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()


# The KV cache of all layers, in one memory for all KV groups; scales of 8-bit keys and values are in another.


def kv_cache_bytes(groups: Sequence[Sequence[KVShape]], block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block."""
    num_bytes = dtype.itemsize * torch_attention.numbers_per_token(groups)
    if dtype.itemsize == 1:
        num_bytes += torch.float32.itemsize * torch_attention.numbers_per_token(_of_scales(groups))
    return block_size * num_bytes


def new_kv_cache(
    groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[list[LayerCache]]:
    """Return empty keys and values [B, N, KH, D] of each layer, with scales [B, KH, N] if they have 8 bits.

    The layers of a group lie in a block one after the other.
    """
    if dtype.itemsize > 1:
        return torch_attention.new_kv_cache(groups, num_blocks, block_size, dtype, device)
    codes = torch_attention.new_kv_cache(groups, num_blocks, block_size, torch.uint8, device)
    scales = torch_attention.new_kv_cache(_of_scales(groups), num_blocks, block_size, torch.float32, device)
    return [[_coded(*pair, dtype) for pair in zip(*some, strict=True)] for some in zip(codes, scales, strict=True)]


def _of_scales(groups: Sequence[Sequence[KVShape]]) -> list[list[KVShape]]:
    return [[KVShape(shape.num_kv_heads, 1) for shape in group] for group in groups]


def _coded(codes: LayerCache, scales: LayerCache, dtype: torch.dtype) -> LayerCache:
    num_blocks, block_size, num_kv_heads, _ = codes.keys.shape
    key_scales, value_scales = (
        some.view(num_blocks, num_kv_heads, block_size) for some in (scales.keys, scales.values)
    )
    return LayerCache(codes.shape, codes.keys.view(dtype), codes.values.view(dtype), key_scales, value_scales)
