"""The operations in plain torch: the reference for the tests, and the fallback if no faster kernels can run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, KVShape
from engine.kernels.interface import ExpertLinearOp, KernelOptions, LinearOp
from engine.kernels.torch import attention, experts, rows
from engine.kernels.torch.linear import Invariant, Product, adding, find_invariant, new_product, padded
from engine.sampling.sampler import Sampler
from engine.weights import Weight


class TorchKernels:
    """Plain torch on any device."""

    name = "torch"
    keep_packed: frozenset[str] = frozenset()
    is_graphed = False
    separates_prompts = False
    warm_up_rows = frozenset({2})

    def __init__(self, options: KernelOptions, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.dtype = self.vector_dtype = options.dtype
        self.formats = f"weights and KV cache {str(options.dtype).removeprefix('torch.')}"
        self.num_threads = self.num_torch_threads = torch.get_num_threads()
        self.new_kv_cache = partial(attention.new_kv_cache, dtype=self.dtype, device=device)
        self.new_sampler = partial(Sampler, device=device)
        self.deterministic = True  # until a probe finds no invariant form of a product
        self._invariants: dict[
            tuple[torch.Size, torch.dtype, bool], Invariant
        ] = {}  # by weights and whether there is a bias
        self._query_tiles: dict[tuple[int, int], tuple[int, ...]] = {}  # (G, D) -> sizes that agree

    def pack(self, weights: Sequence[Weight], dtype: torch.dtype | None = None) -> Tensor:
        return joined(weights, dtype or self.dtype, self.device)

    def linear(self, matrix: Tensor, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        key = (matrix.shape, matrix.dtype, bias is not None)
        bias = None if bias is None else bias.to(matrix.dtype)
        product = new_product(matrix, bias)
        if key not in self._invariants:
            self._invariants[key] = self._find_invariant(product, matrix, bias)
        invariant = self._invariants[key](product)
        dtype = torch.float32 if is_float32 else self.dtype
        return adding(lambda x: invariant(x.to(matrix.dtype)).to(dtype))

    def head_linear(self, matrices: Tensor) -> LinearOp:
        products = [self.linear(matrix.to(self.device, self.dtype)) for matrix in matrices]

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            heads = torch.chunk(x, len(products), dim=1)
            return torch.cat([product(head) for product, head in zip(products, heads, strict=True)], dim=1)

        return product

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    def _find_invariant(self, product: Product, matrix: Tensor, bias: Tensor | None) -> Invariant:
        invariant = find_invariant(product, matrix, bias, self.options.max_num_rows)
        self.deterministic &= invariant is not None
        return invariant or partial(padded, multiple=1)

    def embed(self, token_ids: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
        embedded = F.embedding(token_ids, matrix)
        return embedded if scale == 1.0 else (embedded.float() * scale).to(embedded.dtype)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        normed = F.rms_norm(x.contiguous(), (x.shape[-1],), weight, eps)
        return normed if residual is None else residual.add_(normed)

    layer_norm = staticmethod(rows.layer_norm)

    def add(self, residual: Tensor, x: Tensor, scale: float) -> None:
        # Not add_ with alpha: in bfloat16, it rounds what is left over after whole vectors in another way.
        residual.copy_(residual.float() + x.float() * scale)

    def scale(self, x: Tensor, factor: float, softcap: float | None = None) -> None:
        x.mul_(factor)
        if softcap is not None:
            x.div_(softcap).tanh_().mul_(softcap)

    act_and_mul = staticmethod(rows.act_and_mul)
    gate_rows = staticmethod(rows.gate_rows)

    def pack_experts(self, weights: Sequence[Sequence[Weight]]) -> list[Tensor]:
        return [self.pack(expert) for expert in weights]

    route = staticmethod(experts.route)

    def expert_linear(self, matrices: list[Tensor], bias: Tensor | None = None) -> ExpertLinearOp:
        biases = [None] * len(matrices) if bias is None else bias.unbind()
        products = [self.linear(*pair) for pair in zip(matrices, biases, strict=True)]
        return experts.expert_linear(products, len(matrices[0]))

    combine_experts = staticmethod(experts.combine_experts)

    def kv_cache_bytes(self, groups: Sequence[Sequence[KVShape]], block_size: int) -> int:
        return block_size * self.dtype.itemsize * attention.numbers_per_token(groups)

    cached_keys = staticmethod(attention.cached_keys)
    rope_and_store_kv = staticmethod(rows.rope_and_store_kv)

    def attention_planner(self, kind: AttentionKind) -> None:
        return None

    def plan_attention(
        self, batch: BatchInputs, query_lens: Lengths, kind: AttentionKind, kind_index: int
    ) -> attention.TorchAttentionPlan:
        tile_sizes = self._agreeing_query_tiles(kind.num_heads // kind.num_kv_heads, kind.head_dim)
        return attention.plan_attention(query_lens, batch.seq_lens, kind, tile_sizes, self.device)

    paged_attention = staticmethod(attention.paged_attention)

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


def joined(weights: Sequence[Weight], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights, stacked vertically to [M, K] and dequantized, on the device."""
    tensors = [weight if isinstance(weight, Tensor) else weight.dequantize(dtype) for weight in weights]
    return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(device)
