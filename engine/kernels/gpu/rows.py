"""What is done to each row between the matrix products: norm, rotation, activation. All arithmetic is float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import LayerCache
from engine.kernels.gpu.tiles import LAUNCH_OPTIONS

ACT_COLUMNS = 1024  # of a program
LARGEST = tl.constexpr(80.0)  # e to the power of which is finite, and as good as infinite where it is used


@triton.jit
def _rms_norm(x, weight, out, x_stride, out_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / size + eps)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (values * scale * weights).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, K] over its root mean square, times weight (Zhang and Sennrich 2019). One program for each row."""
    assert x.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        _rms_norm[(len(x),)](x, weight, out, x.stride(0), out.stride(0), x.shape[1], eps, BLOCK=block, **LAUNCH_OPTIONS)
    return out


@triton.jit
def _act_and_mul(gate_up, out, stride, out_stride, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(tl.minimum(-gate, LARGEST)))
    elif ACTIVATION == "gelu":
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh(x) = 1 - 2 / (e^2x + 1), which holds at both ends too
        activated = 0.5 * gate * (2.0 - 2.0 / (tl.exp(tl.minimum(2.0 * inner, LARGEST)) + 1.0))
    tl.store(out + row * out_stride + columns, (activated * up).to(out.dtype.element_ty), mask=mask)


def act_and_mul(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of gate_up [T, 2 I] -> [T, I]; `activation` is silu, gelu or gelu_pytorch_tanh."""
    num_rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(size, ACT_COLUMNS))
        _act_and_mul[grid](
            gate_up, out, gate_up.stride(0), out.stride(0), size, activation, BLOCK=ACT_COLUMNS, **LAUNCH_OPTIONS
        )
    return out


@triton.jit
def _rotate(x, out, cos, sin, half, BLOCK: tl.constexpr):
    """The pairs (i, i + half) of one head."""
    columns = tl.arange(0, BLOCK)
    mask = columns < half
    first = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + half + columns, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + columns, mask=mask, other=0.0)
    s = tl.load(sin + columns, mask=mask, other=0.0)
    tl.store(out + columns, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + half + columns, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rope_and_store_kv(
    q, k, v, out, cos, sin, slots, keys, values, row_stride, num_heads, num_kv_heads, half, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size = 2 * half
    cos += row * half
    sin += row * half
    if head < num_heads:
        _rotate(q + row * row_stride + head * size, out + (row * num_heads + head) * size, cos, sin, half, BLOCK)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            kv_head = head - num_heads
            place = (slot * num_kv_heads + kv_head) * size
            _rotate(k + row * row_stride + kv_head * size, keys + place, cos, sin, half, BLOCK)
            columns = tl.arange(0, 2 * BLOCK)
            mask = columns < size
            value = tl.load(v + row * row_stride + kv_head * size + columns, mask=mask)
            tl.store(values + place + columns, value.to(values.dtype.element_ty), mask=mask)


def rope_and_store_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """Rotate q [T, H, D] and k [T, KH, D] (Su et al. 2021), store k and v at `slots` [T] unless they are negative, and
    return the rotated q.

    cos and sin are float32 [T, D / 2]; the cache's keys and values are [B, N, KH, D].
    """
    num_rows, num_heads, size = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty((num_rows, num_heads, size), dtype=q.dtype, device=q.device)
    assert q.stride(0) == k.stride(0) == v.stride(0)
    assert q.stride(1) == k.stride(1) == v.stride(1) == size
    if num_rows:
        _rope_and_store_kv[(num_rows, num_heads + num_kv_heads)](
            q,
            k,
            v,
            out,
            cos,
            sin,
            slots,
            cache.keys,
            cache.values,
            q.stride(0),
            num_heads,
            num_kv_heads,
            size // 2,
            BLOCK=triton.next_power_of_2(size // 2),
            **LAUNCH_OPTIONS,
        )
    return out
