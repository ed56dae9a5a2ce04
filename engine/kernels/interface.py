"""The matrix products of a decoder and what happens between them, one signature for each operation.

`load_kernels` chooses an implementation once, at start. Every implementation keeps promise 1: what a row's result is
depends on that row and on its own keys and values, never on how many rows there are or which neighbours it has.

Shapes are named after T: rows (tokens) of the batch, S: sequences, H: query heads, KH: KV heads, G = H / KH: query
heads that share a KV head (grouped-query attention), D: head size, B: blocks, N: tokens of a block, V: token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.sampling.sampler import SamplerOutput
from engine.scheduling.request import SampledRequest
from engine.weights import Weight

ExecutionKind: TypeAlias = Literal["eager", "program", "cuda_graphs"]


@dataclass(frozen=True)
class KernelOptions:
    """What kernels are to be made for."""

    dtype: torch.dtype
    quantization: str = "auto"  # auto: as the checkpoint has it; none: dtype; int8: groups of 32
    kv_cache_dtype: str = "auto"  # auto: dtype; int8: with a scale for each token and head
    max_num_rows: int = 0  # of a batch
    head_dim: int = 64
    block_size: int = 32
    batch_invariant: bool = True
    enforce_eager: bool = False
    num_lora_places: int = 0  # places for LoRA adapters
    max_lora_rank: int = 0


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """What LoRA adapters (Hu et al. 2021) add to one product: y += B (A x), in P places for one adapter each.

    The M outputs are those of several parts, one after the other, of which each has an A of its own.
    """

    a: Tensor  # [P, parts, R, K]
    b: Tensor  # [P, R, M], scaled
    ranks: Tensor  # int64 [P, parts], at most R; 0: nothing is added to the part
    sizes: tuple[int, ...]  # outputs of each part


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, laid out as the kernels want them."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None  # float32 [B, KH, N], where keys and values are int8
    value_scales: Tensor | None = None


class LinearOp(Protocol):
    """A matrix product with fixed weights: x [T, K] -> [T, M]."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product; added to `residual`, in place, where there is one."""
        ...


class SamplesTokens(Protocol):
    """`engine.sampler.Sampler`, or what does the same."""

    def sample(
        self, logits: Tensor, requests: Sequence[SampledRequest], masks: Mapping[int, bytes] = ...
    ) -> SamplerOutput:
        """The next token of each request from its row of logits, float32 [R, V], which may be changed in place."""
        ...


class Kernels(Protocol):
    """The operations of a decoder on one device."""

    name: str
    deterministic: bool  # whether the promise is kept
    keep_packed: frozenset[str]  # GGML types that `pack` takes as they are
    vector_dtype: torch.dtype  # of norms and biases
    num_threads: int  # that compute
    num_torch_threads: int  # how many of torch's own are wanted
    execution: ExecutionKind  # how a model runs on them: see engine.execution.load
    num_warm_up_tokens: int  # of a prompt with which all kernels are used that most requests need

    @property
    def separates_prompts(self) -> bool:
        """Whether a token's keys and values have other bits in a prompt than where they were generated."""
        ...

    @property
    def formats(self) -> str:
        """Those of weights and KV cache, in words."""
        ...

    def pack(self, parts: Sequence[Weight]) -> Any:
        """Matrices of weights [M, K], one below the other, in the layout that `linear` and `embed` want."""
        ...

    def linear(self, matrix: Any, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        """Prepare y = x W^T + b, in the type of x or in float32, to which torch's own products are widened."""
        ...

    def new_lora_weights(self, sizes: Sequence[int], num_inputs: int) -> LoraWeights | None:
        """Empty places for adapters of a product whose parts have so many outputs; None where there are no places."""
        ...

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, places: Tensor) -> None:
        """Add to each row of out [T, M], in place, what its adapter makes of its row of x [T, K].

        `places`, int64 [T], say where each row's adapter lies, -1: nowhere. Sums are float32.
        """
        ...

    def embed(self, token_ids: Tensor, matrix: Any) -> Tensor:
        """Rows `token_ids` [T] of a packed matrix [M, K]: the residual stream [T, K]."""
        ...

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a table."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, K] over its root mean square, times weight (Zhang and Sennrich 2019)."""
        ...

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one block in one layer."""
        ...

    def new_layer_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        """An empty cache of one layer."""
        ...

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        """Rotate q [T, H, D] and k [T, KH, D] by their positions (Su et al. 2021, halves as in Hugging Face's Llama),
        store k and v at `slots` [T] (block id * N + offset) of the cache, and return the rotated q.

        cos and sin are float32 [T, D / 2].
        """
        ...

    def plan_attention(
        self, batch: BatchInputs, query_lens: Lengths, num_heads: int, num_kv_heads: int, cache: LayerCache
    ) -> Any:
        """What `paged_attention` needs to know of the last `query_lens` rows of each sequence of a batch.

        It is worked out once a step rather than once a layer.
        """
        ...

    def paged_attention(self, q: Tensor, cache: LayerCache, plan: Any, scale: float, window: int | None) -> Tensor:
        """Causal attention of q [T, H, D] to the keys and values that each row's sequence has in its blocks.

        A row at position p sees positions max(0, p - window + 1) .. p. Softmax in float32. Returns [T, H, D].
        """
        ...

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """act(gate) * up of gate_up [T, 2 I] -> [T, I] (GLU variants, Shazeer 2020).

        `activation` is silu (SwiGLU), gelu, or gelu_pytorch_tanh.
        """
        ...

    def temporaries(self) -> AbstractContextManager[None]:
        """What is computed inside, all but what is added to a residual stream, is not used after it."""
        ...

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> SamplesTokens:
        """Samples tokens of a vocabulary."""
        ...
