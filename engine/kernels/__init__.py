"""What happens between and in the matrix products of a decoder, one signature for each operation.

`load_kernels` chooses an implementation once, at start. Every implementation keeps promise 1: what a row's result is
depends on that row and on its own keys and values, never on how many rows there are or which neighbours it has.

Shapes are named after T: rows (tokens) of the batch, S: sequences, H: query heads, KH: KV heads, G = H / KH: query
heads that share a KV head (grouped-query attention), D: head size, B: blocks, N: tokens of a block.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from engine.batch import BatchInputs


class LinearOp(Protocol):
    """A matrix product with fixed weights: x [T, K] -> [T, M]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Kernels(Protocol):
    """The operations of a decoder on one device."""

    name: str
    deterministic: bool  # whether probes at load found the promise kept

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        """Prepare y = x W^T + b for weight [M, K], which may be kept in another layout."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, K] over its root mean square, times weight (Zhang and Sennrich 2019)."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to the residual stream, in place, and return its rms_norm."""
        ...

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """Rotate q [T, H, D] and k [T, KH, D] by their positions (Su et al. 2021, halves as in Hugging Face's Llama),
        store k and v at `slots` [T] (block id * N + offset) of the caches [B, N, KH, D], and return the rotated q.

        cos and sin are float32 [T, D / 2].
        """
        ...

    def plan_attention(self, batch: BatchInputs, num_heads: int, k_cache: Tensor) -> Any:
        """What `paged_attention` needs to know of a batch, worked out once a step rather than once a layer."""
        ...

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Any, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of q [T, H, D] to the keys and values that each row's sequence has in its blocks.

        A row at position p sees positions max(0, p - window + 1) .. p. Softmax in float32. Returns [T, H, D].
        """
        ...

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """act(gate) * up of gate_up [T, 2 I] -> [T, I] (GLU variants, Shazeer 2020).

        `activation` is silu (SwiGLU), gelu, or gelu_pytorch_tanh.
        """
        ...


def load_kernels(device: torch.device, dtype: torch.dtype, max_num_rows: int) -> Kernels:
    """The implementation for a device, for batches of up to `max_num_rows`.

    So far there is one, in plain torch, which runs everywhere.
    """
    from engine.kernels.reference import TorchKernels

    return TorchKernels(device, dtype, max_num_rows)
