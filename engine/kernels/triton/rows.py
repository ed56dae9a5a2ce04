"""The operations on each row between the matrix products: norm, activation, rotation. All arithmetic is float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import LayerCache
from engine.kernels.triton.float8 import MAX_FLOAT8, float8_bits
from engine.kernels.triton.tiles import LAUNCH_OPTIONS

ACT_COLUMNS = 1024  # of a program
SMALLEST = tl.constexpr(1e-30)  # a head whose largest number is not above this is stored as zeros
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer
LARGEST = tl.constexpr(80.0)  # exp(80) is finite, and large enough to stand for infinity here


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
    """Return x [T, K] divided by its root mean square, times weight (Zhang and Sennrich 2019). One program per row."""
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
        # tanh(x) = 1 - 2 / (e^2x + 1), also correct for large |x|
        activated = 0.5 * gate * (2.0 - 2.0 / (tl.exp(tl.minimum(2.0 * inner, LARGEST)) + 1.0))
    tl.store(out + row * out_stride + columns, (activated * up).to(out.dtype.element_ty), mask=mask)


def act_and_mul(gate_up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up of gate_up [T, 2 I]: [T, I]. `activation` is silu, gelu or gelu_pytorch_tanh."""
    num_rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(size, ACT_COLUMNS))
        _act_and_mul[grid](
            gate_up, out, gate_up.stride(0), out.stride(0), size, activation, BLOCK=ACT_COLUMNS, **LAUNCH_OPTIONS
        )
    return out


@triton.jit
def _rotated(x, cos, sin, half, BLOCK: tl.constexpr):
    """Return one head, rotated in the pairs (i, i + half)."""
    columns = tl.arange(0, BLOCK)
    mask = columns < 2 * half
    is_first = columns < half
    angles = tl.where(is_first, columns, columns - half)
    values = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    others = tl.load(x + tl.where(is_first, columns + half, columns - half), mask=mask, other=0.0).to(tl.float32)
    turned = others * tl.load(sin + angles, mask=mask, other=0.0)
    return values * tl.load(cos + angles, mask=mask, other=0.0) + tl.where(is_first, -turned, turned)


@triton.jit
def _store_head(values, heads, index, scales, scale_index, size, HAS_SCALES: tl.constexpr, BLOCK: tl.constexpr):
    """Store one head [BLOCK], or its codes and a scale, which is NaN if a number is not finite.

    Codes are int8 in -127 .. 127, or float8 up to 448, or its bits in uint8.
    """
    columns = tl.arange(0, BLOCK)
    heads += index * size + columns
    if HAS_SCALES:
        is_int8: tl.constexpr = heads.dtype.element_ty == tl.int8
        most: tl.constexpr = 127.0 if is_int8 else MAX_FLOAT8
        sizes = tl.abs(values)
        are_finite = tl.min((sizes < float("inf")).to(tl.int32), axis=0) > 0
        largest = tl.max(sizes, axis=0)
        tl.store(scales + scale_index, tl.where(are_finite, tl.div_rn(largest, most), float("nan")))
        has_codes = are_finite & (largest > SMALLEST)
        codes = tl.where(has_codes, values, 0.0) * tl.div_rn(most, tl.where(has_codes, largest, 1.0))
        if is_int8:
            codes = (codes + ROUNDER) - ROUNDER
            tl.store(heads, codes.to(tl.int8), mask=columns < size)
        else:
            tl.store(heads, float8_bits(codes).to(heads.dtype.element_ty, bitcast=True), mask=columns < size)
    else:
        tl.store(heads, values.to(heads.dtype.element_ty), mask=columns < size)


@triton.jit
def _rope_and_store_kv(
    q,
    k,
    v,
    out,
    cos,
    sin,
    slot_mapping,
    keys,
    values,
    key_scales,
    value_scales,
    row_stride,
    num_heads,
    num_kv_heads,
    half,
    HAS_SCALES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size = 2 * half
    columns = tl.arange(0, BLOCK)
    cos += row * half
    sin += row * half
    if head < num_heads:
        rotated = _rotated(q + row * row_stride + head * size, cos, sin, half, BLOCK)
        pointers = out + (row * num_heads + head) * size + columns
        tl.store(pointers, rotated.to(out.dtype.element_ty), mask=columns < size)
    else:
        slot = tl.load(slot_mapping + row)
        if slot >= 0:
            kv_head = head - num_heads
            first = row * row_stride + kv_head * size
            index = slot * num_kv_heads + kv_head
            scale_index = (slot // TOKENS * num_kv_heads + kv_head) * TOKENS + slot % TOKENS
            key = _rotated(k + first, cos, sin, half, BLOCK)
            value = tl.load(v + first + columns, mask=columns < size, other=0.0).to(tl.float32)
            _store_head(key, keys, index, key_scales, scale_index, size, HAS_SCALES, BLOCK)
            _store_head(value, values, index, value_scales, scale_index, size, HAS_SCALES, BLOCK)


def rope_and_store_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, cache: LayerCache
) -> Tensor:
    """Rotate q [T, H, D] and k [T, KH, D] (Su et al. 2021), store k and v at `slot_mapping` [T], and return q rotated.

    Rows with a negative slot are not stored.
    cos and sin are float32 [T, D / 2]; the cache's keys and values are [B, N, KH, D], with scales [B, KH, N] if they
    have 8 bits.
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
            slot_mapping,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            q.stride(0),
            num_heads,
            num_kv_heads,
            size // 2,
            HAS_SCALES=cache.key_scales is not None,
            TOKENS=cache.keys.shape[1],
            BLOCK=triton.next_power_of_2(size),
            num_warps=1,  # a lane takes four numbers of a head of 128
            **LAUNCH_OPTIONS,
        )
    return out
