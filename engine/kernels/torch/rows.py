"""The operations on each row between the matrix products, in plain torch: activation and rotation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels.interface import LayerCache

# Written out, in float32: F.silu and F.gelu compute the elements left over after whole vectors with another exp or erf,
# so their result for an element depends on its index. exp, erf and tanh by themselves do not have this flaw.


def _silu(x: Tensor) -> Tensor:
    out = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return torch.div(x, out.neg_().exp_().add_(1), out=out)


def _gelu(x: Tensor) -> Tensor:
    x = x.float()
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    x = x.float()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def act_and_mul(gate_up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up of gate_up [T, 2 I]: [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up).to(gate_up.dtype)


def rope_and_store_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, cache: LayerCache
) -> Tensor:
    """Rotate q and k, store k and v in the cache at `slot_mapping`, and return the rotated q."""
    cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    cache.keys.flatten(0, 1).index_copy_(0, slot_mapping, _rotate(k, cos, sin))
    cache.values.flatten(0, 1).index_copy_(0, slot_mapping, v)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of x [T, heads, D], in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
