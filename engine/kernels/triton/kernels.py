"""The operations on a GPU. What has no kernel of its own here (embedding, gathering rows) is plain torch's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Self, TypeAlias

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.kernels.interface import KernelOptions, LayerCache, LinearOp, LoraWeights
from engine.kernels.torch.kernels import TorchKernels, adding
from engine.kernels.triton import attention, lora, prompts, rows
from engine.kernels.triton.attention import AttentionPlan
from engine.kernels.triton.linear import linear
from engine.kernels.triton.packed import READERS, PackedMatrix, from_ggml, to_int8
from engine.kernels.triton.sampler import TritonSampler
from engine.kernels.triton.tiles import card_name, tiles_for
from engine.weights import PackedTensor, Weight, concatenate

Matrix: TypeAlias = list[Tensor | PackedMatrix]  # one below the other


class TritonKernels(TorchKernels):
    """Kernels in Triton, whose results depend on no other row.

    If they need not, products are the library's, which chooses another order of additions for another number of rows;
    those of packed weights stay. So is the attention of batches of whole prompts.

    A KV cache of 8 bits holds int8 with a scale for each token and head, as on a CPU, rather than float8: any card can
    load it, and it is several times as exact, for float8 has three bits after the point whatever the head's range is.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        max_num_rows: int = 0,
        *,
        batch_invariant: bool = True,
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
        enforce_eager: bool = False,
        num_lora_places: int = 0,
        max_lora_rank: int = 0,
    ) -> None:
        super().__init__(device, dtype, max_num_rows, num_lora_places=num_lora_places, max_lora_rank=max_lora_rank)
        self.deterministic = batch_invariant
        self.keep_packed = frozenset(READERS) if quantization == "auto" else frozenset()
        self.cache_dtype = torch.int8 if kv_cache_dtype == "int8" else dtype
        self.to_int8 = quantization == "int8"
        self.execution = "cuda_graphs" if device.type == "cuda" and not enforce_eager else "eager"
        can_attend = prompts.can_attend(device, dtype) and self.cache_dtype == dtype
        self.attends_to_prompts = can_attend and not batch_invariant
        self.weight_formats: list[str] = []  # that were met, in order
        self.tiles = tiles_for(device, dtype)
        self.num_warm_up_tokens = 2 * self.tiles.attention.segment + 1  # keys are split, products not
        self.lora_tiles: dict[tuple[int, ...], Tensor] = {}  # by the sizes of a product's parts
        self.name = f"triton {triton.__version__} {card_name(device)}"

    @classmethod
    def of(cls, options: KernelOptions, device: torch.device) -> Self:
        return cls(
            device,
            options.dtype,
            options.max_num_rows,
            batch_invariant=options.batch_invariant,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            enforce_eager=options.enforce_eager,
            num_lora_places=options.num_lora_places,
            max_lora_rank=options.max_lora_rank,
        )

    def pack(self, parts: Sequence[Weight]) -> Matrix:  # type: ignore[override]
        """Successive weights of one type become one part. If some are not packed, none is."""
        if any(isinstance(part, Tensor) for part in parts):
            parts = [super().pack(parts)]
        groups = itertools.groupby(parts, key=lambda part: "" if isinstance(part, Tensor) else part.type_name)
        return [self._pack_part(list(group)) for _, group in groups]

    def _pack_part(self, parts: list[Weight]) -> Tensor | PackedMatrix:
        packed = [part for part in parts if isinstance(part, PackedTensor)]
        plain = [part for part in parts if isinstance(part, Tensor)]
        name = packed[0].type_name if packed else "int8" if self.to_int8 else str(self.dtype).removeprefix("torch.")
        if name.lower() not in self.weight_formats:
            self.weight_formats.append(name.lower())
            cache = str(self.cache_dtype).removeprefix("torch.")
            self.formats = f"weights {', '.join(self.weight_formats)}, KV cache {cache}"
        if packed:
            return from_ggml(concatenate(packed), self.device)
        return to_int8(plain[0]) if self.to_int8 else plain[0]

    def linear(  # type: ignore[override]
        self, matrix: Matrix, bias: Tensor | None = None, *, is_float32: bool = False
    ) -> LinearOp:
        dtype = torch.float32 if is_float32 else self.dtype
        if not self.deterministic and len(matrix) == 1 and isinstance(weights := matrix[0], Tensor):
            return adding(lambda x: F.linear(x, weights, bias).to(dtype))
        sizes = [len(part) for part in matrix]
        biases = [None] * len(matrix) if bias is None else torch.split(bias, sizes)
        tiles = [self.tiles.linear_for(*part.shape) for part in matrix]

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            adds = residual is not None
            out = torch.empty((len(x), sum(sizes)), dtype=dtype, device=x.device) if residual is None else residual
            columns = torch.split(out, sizes, dim=1)
            for part, part_bias, part_tiles, some in zip(matrix, biases, tiles, columns, strict=True):
                linear(x, part, part_bias, part_tiles, some, adds=adds)
            return out

        return product

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, places: Tensor) -> None:
        if weights.sizes not in self.lora_tiles:
            self.lora_tiles[weights.sizes] = lora.column_tiles(weights.sizes, self.device)
        lora.add_lora(x, out, weights, places, self.lora_tiles[weights.sizes])

    def embed(self, token_ids: Tensor, matrix: Matrix) -> Tensor:  # type: ignore[override]
        (table,) = matrix
        return F.embedding(token_ids, table) if isinstance(table, Tensor) else table.rows(token_ids, self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        return rows.act_and_mul(gate_up, activation)

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        head_bytes = head_dim + 4 if self.cache_dtype == torch.int8 else head_dim * self.dtype.itemsize
        return 2 * block_size * num_kv_heads * head_bytes

    def new_layer_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        """Keys and values [B, N, KH, D]; scales of int8 [B, KH, N]."""
        if self.cache_dtype != torch.int8:
            return super().new_layer_cache(num_blocks, block_size, num_kv_heads, head_dim)
        shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
        keys, values = torch.zeros(shape, dtype=torch.int8, device=self.device)
        scales = torch.zeros((2, num_blocks, num_kv_heads, block_size), device=self.device)
        return LayerCache(keys, values, *scales)

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        return rows.rope_and_store_kv(q, k, v, cos, sin, slots, cache)

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> TritonSampler:  # type: ignore[override]
        return TritonSampler(vocab_size, eos_token_ids, self.device)

    def plan_attention(  # type: ignore[override]
        self, batch: BatchInputs, query_lens: Lengths, num_heads: int, num_kv_heads: int, cache: LayerCache
    ) -> AttentionPlan:
        is_decode = len(query_lens) == len(batch.token_ids) and bool((query_lens == 1).all())
        plan = attention.plan_attention(
            query_lens,
            batch.seq_lens,
            batch.block_tables,
            num_heads // num_kv_heads,
            num_kv_heads,
            self.tiles.attention,
            positions=batch.positions if is_decode else None,
        )
        whole = prompts.plan_prompts(batch, query_lens, cache) if self.attends_to_prompts else None
        return replace(plan, prompts=whole)

    def paged_attention(  # type: ignore[override]
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor:
        if plan.prompts is not None and window is None:
            return prompts.prompt_attention(q, cache, plan.prompts, scale)
        return attention.paged_attention(q.contiguous(), cache, plan, scale, window, self.tiles.attention)
