"""The operations on each row between the matrix products, in plain torch: activation, norms and rotation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.interface import HeadNorms, LayerCache, Rotations, check_heads

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


def _sigmoid(x: Tensor) -> Tensor:
    out = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return out.neg_().exp_().add_(1).reciprocal_()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "identity": lambda x: x.to(torch.float32, memory_format=torch.contiguous_format, copy=True),
}


def act_and_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up for gate and up [T, I]."""
    if activation == "swigluoai":
        return _clamped_swiglu(gate.float(), up.float()).to(gate.dtype)
    return ACTIVATIONS[activation](gate).mul_(up).to(gate.dtype)


def gate_rows(x: Tensor, gate: Tensor) -> Tensor:
    """Return each row of x [T, K] times the sigmoid of its number in gate [T, 1]."""
    return (x.float() * _sigmoid(gate)).to(x.dtype)


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return the activation of gpt-oss."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [T, K] minus its mean, divided by its standard deviation, times weight; in float32."""
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), None, eps).to(x.dtype)


def rope_and_store_kv(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotations: Rotations,
    slot_mapping: Tensor,
    cache: LayerCache,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Norm and rotate q and k, store k and v in the cache at `slot_mapping`, and return the rotated q."""
    check_heads(q, k, v, rotations, slot_mapping, cache, norms)
    if k is not None and v is not None:
        keys = _rotate(_norm_heads(k, norms.k if norms else None, norms), rotations.k)
        stored = slot_mapping >= 0
        slots = slot_mapping[stored]
        blocks, offsets = slots // cache.keys.shape[1], slots % cache.keys.shape[1]
        cache.keys[blocks, offsets] = keys[stored]
        cache.values[blocks, offsets] = _norm_heads(v, norms.v if norms else None, norms)[stored]
    return _rotate(_norm_heads(q, norms.q if norms else None, norms), rotations.q)


def _norm_heads(x: Tensor, weight: Tensor | None, norms: HeadNorms | None) -> Tensor:
    """Return the RMS norm of x [T, heads, D]: of each head, or of all together if the weight has as many numbers."""
    if weight is None or norms is None:
        return x
    rows = x.reshape(-1, len(weight))
    return F.rms_norm(rows, (len(weight),), weight, norms.eps).view(x.shape)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of x [T, heads, D], in float32, by angles [T, D]."""
    cos, sin = rotation[:, None].chunk(2, dim=-1)  # the same for all heads
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
