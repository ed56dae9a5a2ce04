"""The operations in plain torch: the reference for the tests, and the fallback if no faster kernels can run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.kernels.interface import ExecutionKind, KernelOptions, LayerCache, LinearOp, LoraWeights
from engine.kernels.torch import attention, lora, rows
from engine.kernels.torch.linear import Invariant, Product, adding, find_invariant, new_product, padded
from engine.sampling.sampler import Sampler
from engine.weights import Weight


class TorchKernels:
    """Plain torch on any device."""

    name = "torch"
    keep_packed: frozenset[str] = frozenset()
    execution: ExecutionKind = "eager"
    separates_prompts = False
    warm_up_rows = frozenset({2})

    def __init__(self, options: KernelOptions, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.dtype = self.vector_dtype = options.dtype
        self.formats = f"weights and KV cache {str(options.dtype).removeprefix('torch.')}"
        self.num_threads = self.num_torch_threads = torch.get_num_threads()
        self.deterministic = True  # until a probe finds no invariant form of a product
        self._invariants: dict[tuple[torch.Size, bool], Invariant] = {}  # by weight shape and whether there is a bias
        self._query_tiles: dict[tuple[int, int], tuple[int, ...]] = {}  # (G, D) -> sizes that agree

    def pack(self, weights: Sequence[Weight]) -> Tensor:
        return joined(weights, self.dtype, self.device)

    def linear(self, matrix: Tensor, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        key = (matrix.shape, bias is not None)
        product = new_product(matrix, bias)
        if key not in self._invariants:
            self._invariants[key] = self._find_invariant(product, matrix.shape[1])
        invariant = self._invariants[key](product)
        return adding(lambda x: invariant(x).float()) if is_float32 else adding(invariant)

    def _find_invariant(self, product: Product, num_inputs: int) -> Invariant:
        invariant = find_invariant(product, num_inputs, self.options.max_num_rows, self.device, self.dtype)
        self.deterministic &= invariant is not None
        return invariant or partial(padded, multiple=1)

    def new_lora_weights(self, sizes: Sequence[int], num_inputs: int) -> LoraWeights | None:
        return lora.new_lora_weights(self.options, sizes, num_inputs, self.device)

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, lora_slots: Tensor) -> None:
        lora.add_lora(x, out, weights, lora_slots)

    def embed(self, token_ids: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(token_ids, matrix)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        return rows.act_and_mul(gate_up, activation)

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * block_size * num_kv_heads * head_dim * self.dtype.itemsize

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> list[LayerCache]:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return [attention.new_layer_cache(shape, self.dtype, self.device) for _ in range(num_layers)]

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, cache: LayerCache
    ) -> Tensor:
        return rows.rope_and_store_kv(q, k, v, cos, sin, slot_mapping, cache)

    def attention_planner(self, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
        return None

    def plan_attention(
        self,
        batch: BatchInputs,
        query_lens: Lengths,
        num_heads: int,
        num_kv_heads: int,
        cache: LayerCache,
        window: int | None,
    ) -> attention.TorchAttentionPlan:
        _, block_size, _, head_dim = cache.keys.shape
        group_size = num_heads // num_kv_heads
        tile_sizes = self._agreeing_query_tiles(group_size, head_dim)
        return attention.plan_attention(
            query_lens, batch.seq_lens, batch.block_tables, block_size, group_size, tile_sizes, window
        )

    def paged_attention(self, q: Tensor, cache: LayerCache, plan: attention.TorchAttentionPlan, scale: float) -> Tensor:
        return attention.paged_attention(q, cache, plan, scale)

    def _agreeing_query_tiles(self, group_size: int, head_dim: int) -> tuple[int, ...]:
        """Return all of QUERY_TILES if they give a row the same bits, else the second alone."""
        key = (group_size, head_dim)
        if key not in self._query_tiles:
            tiles: tuple[int, ...] = attention.QUERY_TILES
            if not attention.products_agree(*key, tiles, self.device, self.dtype):
                tiles = attention.QUERY_TILES[1:2]
                self.deterministic &= attention.products_agree(*key, tiles, self.device, self.dtype)
            self._query_tiles[key] = tiles
        return self._query_tiles[key]

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> Sampler:
        return Sampler(vocab_size, eos_token_ids, self.device)


def joined(weights: Sequence[Weight], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights, stacked vertically to [M, K] and dequantized, on the device."""
    tensors = [weight if isinstance(weight, Tensor) else weight.dequantize(dtype) for weight in weights]
    return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(device)
