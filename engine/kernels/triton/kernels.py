"""The operations on a GPU: Triton kernels, and plain torch for embedding and gathering rows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.batch.transfer import to_device
from engine.kernels.interface import ExecutionKind, KernelOptions, LayerCache, LinearOp, LoraWeights
from engine.kernels.torch.attention import new_layer_cache
from engine.kernels.torch.kernels import joined
from engine.kernels.torch.linear import adding
from engine.kernels.torch.lora import new_lora_weights
from engine.kernels.triton import attention, lora, prompt_attention, rows
from engine.kernels.triton.attention import TritonAttentionPlan
from engine.kernels.triton.attention_plan import TritonAttentionPlanner, new_planner
from engine.kernels.triton.linear import linear
from engine.kernels.triton.packed_matrix import (
    PACKED_TYPES,
    PackedMatrix,
    from_float8,
    from_ggml,
    from_groups,
    to_int8,
)
from engine.kernels.triton.sampler import TritonSampler
from engine.kernels.triton.tiles import card_name, compute_capability, num_multiprocessors, tiles_for
from engine.weights import Float8Tensor, GroupQuantized, PackedTensor, Weight, concatenate, layout_of

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
        is_graphed = device.type == "cuda" and not options.enforce_eager
        self.execution: ExecutionKind = "cuda_graphs" if is_graphed else "eager"
        self.keep_packed = PACKED_TYPES if options.quantization == "auto" else frozenset()
        capability = compute_capability(device)
        self.has_float8 = capability is not None and capability >= FLOAT8_CAPABILITY
        float8 = torch.float8_e4m3fn if self.has_float8 else torch.uint8  # its bits
        self.cache_dtype = {"int8": torch.int8, "fp8": float8}.get(options.kv_cache_dtype, options.dtype)
        self.has_scales = self.cache_dtype.itemsize == 1
        reason = prompt_attention.unsupported_reason(options, capability)
        self.uses_flash_attention = not options.batch_invariant and reason is None
        if not options.batch_invariant and reason is not None:
            logger.warning("torch's flash attention, which is faster for prompts, is not used: %s", reason)
        self.weight_formats: list[str] = []  # of the weights packed so far, in order
        self.tiles = tiles_for(capability, options.dtype)
        self.warm_up_rows = frozenset({2 * self.tiles.attention.segment + 1})  # with so many, attention splits the keys
        self.lora_tiles: dict[tuple[int, ...], Tensor] = {}  # by the sizes of a product's projections

    @property
    def formats(self) -> str:
        is_fp8 = self.options.kv_cache_dtype == "fp8"
        cache = "float8_e4m3fn" if is_fp8 else str(self.cache_dtype).removeprefix("torch.")
        return f"weights {', '.join(self.weight_formats)}, KV cache {cache}"

    def pack(self, weights: Sequence[Weight]) -> Matrix:
        """Successive weights of one type become one part. If one weight is not packed, all are dequantized."""
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
        match weight:
            case PackedTensor():
                return from_ggml(weight, self.device)
            case GroupQuantized():
                return from_groups(weight, self.device)
            case Float8Tensor():
                return from_float8(weight, self.device, is_native=self.has_float8)
        return to_int8(weight) if is_int8 else weight

    def linear(self, matrix: Matrix, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        dtype = torch.float32 if is_float32 else self.dtype
        if not self.deterministic and len(matrix) == 1 and isinstance(weights := matrix[0], Tensor):
            return adding(lambda x: F.linear(x, weights, bias).to(dtype))
        sizes = [len(part) for part in matrix]
        biases = [None] * len(matrix) if bias is None else torch.split(bias, sizes)
        tiles = [self.tiles.linear_for(*part.shape, is_packed=isinstance(part, PackedMatrix)) for part in matrix]
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

    def new_lora_weights(self, sizes: Sequence[int], num_inputs: int) -> LoraWeights | None:
        return new_lora_weights(self.options, sizes, num_inputs, self.device)

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, lora_slots: Tensor) -> None:
        if weights.sizes not in self.lora_tiles:
            self.lora_tiles[weights.sizes] = lora.column_tiles(weights.sizes, self.device)
        lora.add_lora(x, out, weights, lora_slots, self.lora_tiles[weights.sizes])

    def embed(self, token_ids: Tensor, matrix: Matrix) -> Tensor:
        (table,) = matrix
        return F.embedding(token_ids, table) if isinstance(table, Tensor) else table.rows(token_ids, self.dtype)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        return rows.act_and_mul(gate_up, activation)

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        head_bytes = head_dim + 4 if self.has_scales else head_dim * self.dtype.itemsize
        return 2 * block_size * num_kv_heads * head_bytes

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> list[LayerCache]:
        return [self._new_layer_cache((num_blocks, block_size, num_kv_heads, head_dim)) for _ in range(num_layers)]

    def _new_layer_cache(self, shape: tuple[int, int, int, int]) -> LayerCache:
        """Keys and values are [B, N, KH, D], the scales of codes of 8 bits [B, KH, N]."""
        if not self.has_scales:
            return new_layer_cache(shape, self.dtype, self.device)
        keys, values = torch.zeros((2, *shape), dtype=torch.uint8, device=self.device).view(self.cache_dtype)
        num_blocks, block_size, num_kv_heads, _ = shape
        scales = torch.zeros((2, num_blocks, num_kv_heads, block_size), device=self.device)
        return LayerCache(keys, values, *scales)

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, cache: LayerCache
    ) -> Tensor:
        return rows.rope_and_store_kv(q, k, v, cos, sin, slot_mapping, cache)

    def attention_planner(
        self, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
    ) -> TritonAttentionPlanner:
        sizes = self.tiles.attention_for(head_dim)
        num_programs = num_multiprocessors(self.device) * sizes.programs
        return new_planner(sizes, num_heads, num_kv_heads, head_dim, window, num_programs)

    def plan_attention(
        self,
        batch: BatchInputs,
        query_lens: Lengths,
        num_heads: int,
        num_kv_heads: int,
        cache: LayerCache,
        window: int | None,
    ) -> TritonAttentionPlan:
        planner = self.attention_planner(num_heads, num_kv_heads, cache.keys.shape[3], window)
        prompts = prompt_attention.plan_prompts(batch, query_lens, cache) if self.uses_flash_attention else None
        query_lens = query_lens if prompts is None else query_lens[: prompts.first_sequence]
        table, num_partial_rows = batch.attention_work, batch.num_partial_rows
        if table is None or not np.array_equal(query_lens, batch.query_lens):
            work = planner.plan(query_lens, batch.seq_lens[: len(query_lens)])
            table, num_partial_rows = to_device(work.table, np.int64, self.device), work.num_partial_rows
        return TritonAttentionPlan(table, planner.num_programs, num_partial_rows, batch.block_tables, window, prompts)

    def paged_attention(self, q: Tensor, cache: LayerCache, plan: TritonAttentionPlan, scale: float) -> Tensor:
        out = attention.paged_attention(q.contiguous(), cache, plan, scale, self.tiles.attention_for(q.shape[2]))
        if plan.prompts is not None:
            prompt_attention.prompt_attention(out, cache, plan.prompts, scale, plan.window)
        return out

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> TritonSampler:
        return TritonSampler(vocab_size, eos_token_ids, self.device)
