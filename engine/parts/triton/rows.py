"""The operations on each row between the matrix products: norms, sums, activation, rotation. All is float32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import HeadNorms, LayerCache, Rotations, check_heads
from engine.parts.triton.float8 import MAX_FLOAT8, float8_bits
from engine.parts.triton.tiles import LAUNCH_OPTIONS

ROW_COLUMNS = 1024  # of a program
SMALLEST = tl.constexpr(1e-30)  # a head whose largest number is not above this is stored as zeros
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer
LARGEST = tl.constexpr(80.0)  # exp(80) is finite, and large enough to stand for infinity here


@triton.jit
def _norm(
    x,
    weight,
    out,
    x_stride,
    out_stride,
    size,
    eps,
    IS_LAYER_NORM: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        values = tl.where(mask, values - tl.sum(values) / size, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / size + eps)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    normed = (values * scale * weights).to(out.dtype.element_ty)
    pointers = out + row * out_stride + columns
    if ADDS:  # rounded first, as if it had been stored
        normed = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + normed.to(tl.float32)
    tl.store(pointers, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Return x [T, K] divided by its root mean square, times weight (Zhang and Sennrich 2019).

    With `residual`, add it to that in place and return that. One program per row.
    """
    return _normed(x, weight, eps, residual, is_layer_norm=False)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [T, K] minus its mean, divided by its standard deviation, times weight (Ba et al. 2016)."""
    return _normed(x, weight, eps, None, is_layer_norm=True)


def _normed(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, is_layer_norm: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is None else residual
    assert x.stride(1) == out.stride(1) == 1
    assert out.shape == x.shape
    assert weight.shape == (x.shape[1],)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        sizes = (x.stride(0), out.stride(0), x.shape[1], eps)
        flags = {"IS_LAYER_NORM": is_layer_norm, "ADDS": residual is not None, "BLOCK": block}
        _norm[(len(x),)](x, weight, out, *sizes, **flags, **LAUNCH_OPTIONS)
    return out


@triton.jit
def _bounded_exp(x):
    """Return e^x, or for large x a finite number that is large enough to stand for infinity here."""
    return tl.exp(tl.minimum(x, LARGEST))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (_bounded_exp(2.0 * x) + 1.0)  # also correct for large |x|


@triton.jit
def _add(x, out, x_stride, out_stride, size, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sums = tl.load(out + row * out_stride + columns, mask=mask, other=0.0).to(tl.float32) + scale * values
    tl.store(out + row * out_stride + columns, sums.to(out.dtype.element_ty), mask=mask)


def add(residual: Tensor, x: Tensor, scale: float) -> None:
    """Add scale * x to `residual` [T, K], in place."""
    _launch_on_rows(_add, x, residual, size=x.shape[1], scale=scale)


@triton.jit
def _scale(out, out_stride, size, scale, softcap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(out + row * out_stride + columns, mask=mask, other=0.0).to(tl.float32) * scale
    if softcap is not None:
        values = softcap * _tanh(values / softcap)
    tl.store(out + row * out_stride + columns, values.to(out.dtype.element_ty), mask=mask)


def scale(x: Tensor, factor: float, softcap: float | None = None) -> None:
    """Multiply x [T, K] by a factor, in place; then, with a soft cap, replace x by softcap * tanh(x / softcap)."""
    _launch_on_rows(_scale, x, size=x.shape[1], scale=factor, softcap=softcap)


@triton.jit
def _act_and_mul(
    gate, up, out, gate_stride, up_stride, out_stride, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gates = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        activated = gates / (1.0 + _bounded_exp(-gates))
    elif ACTIVATION == "gelu":
        activated = 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    elif ACTIVATION == "sigmoid":
        activated = 1.0 / (1.0 + _bounded_exp(-gates))
    elif ACTIVATION == "identity":
        activated = gates
    elif ACTIVATION == "swigluoai":
        gates = tl.minimum(gates, 7.0, propagate_nan=tl.PropagateNan.ALL)
        ups = tl.clamp(ups, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL) + 1.0
        activated = gates / (1.0 + _bounded_exp(-1.702 * gates))
    else:
        activated = 0.5 * gates * (1.0 + _tanh(0.7978845608028654 * (gates + 0.044715 * gates * gates * gates)))
    tl.store(out + row * out_stride + columns, (activated * ups).to(out.dtype.element_ty), mask=mask)


def act_and_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up for gate and up [T, I]. `activation` is one of those that the interface names."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch_on_rows(_act_and_mul, gate, up, out, size=gate.shape[1], ACTIVATION=activation)
    return out


def _launch_on_rows(kernel: Any, *tensors: Tensor, size: int, **arguments: Any) -> None:
    """Launch a kernel on tensors and their strides, with a program for each row and piece of its `size` columns."""
    assert all(tensor.stride(1) == 1 for tensor in tensors)
    assert all(tensor.shape == (len(tensors[0]), size) for tensor in tensors)
    if len(tensors[0]):
        grid = (len(tensors[0]), triton.cdiv(size, ROW_COLUMNS))
        strides = (tensor.stride(0) for tensor in tensors)
        kernel[grid](*tensors, *strides, size, **arguments, BLOCK=ROW_COLUMNS, **LAUNCH_OPTIONS)


@triton.jit
def _load_normed(x, weight, columns, scale, size):
    """Return the numbers of one head at `columns`, multiplied by `scale` and the weight if there is one."""
    mask = columns < size
    loaded = tl.load(x + columns, mask=mask, other=0.0)
    values = loaded.to(tl.float32)
    if weight is not None:
        normed = values * scale * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        values = normed.to(loaded.dtype).to(tl.float32)  # rounded, as if it had been stored
    return values


@triton.jit
def _norm_scale(x, weight, size, eps, BLOCK: tl.constexpr):
    """Return the inverse of the root mean square of one head, if its norm has a weight."""
    scale = 1.0
    if weight is not None:
        columns = tl.arange(0, BLOCK)
        values = tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(values * values) / size + eps)
    return scale


@triton.jit
def _rotated(x, weight, rotation, half, eps, BLOCK: tl.constexpr):
    """Return one head, normed if there is a weight, and rotated in the pairs (i, i + half)."""
    columns = tl.arange(0, BLOCK)
    size = 2 * half
    mask = columns < size
    is_first = columns < half
    pairs = tl.where(is_first, columns, columns - half)
    scale = _norm_scale(x, weight, size, eps, BLOCK)
    values = _load_normed(x, weight, columns, scale, size)
    others = _load_normed(x, weight, tl.where(is_first, columns + half, columns - half), scale, size)
    turned = others * tl.load(rotation + half + pairs, mask=mask, other=0.0)
    return values * tl.load(rotation + pairs, mask=mask, other=0.0) + tl.where(is_first, -turned, turned)


@triton.jit
def _store_head(values, heads, index, scales, scale_index, size, BLOCK: tl.constexpr):
    """Store one head [BLOCK], or its codes and a scale, which is NaN if a number is not finite.

    Codes are int8 in -127 .. 127, or float8 up to 448, or its bits in uint8.
    """
    columns = tl.arange(0, BLOCK)
    heads += index + columns
    if scales is not None:
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
    q_rotations,
    k_rotations,
    q_weight,
    k_weight,
    v_weight,
    slot_mapping,
    keys,
    values,
    key_scales,
    value_scales,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    scale_stride,
    num_heads,
    num_kv_heads,
    half,
    eps,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program has a row, and one of its query heads or one of its KV heads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size = 2 * half
    columns = tl.arange(0, BLOCK)
    if head < num_heads:
        rotation = q_rotations + row * size
        rotated = _rotated(q + row * q_stride + head * size, q_weight, rotation, half, eps, BLOCK)
        pointers = out + (row * num_heads + head) * size + columns
        tl.store(pointers, rotated.to(out.dtype.element_ty), mask=columns < size)
    else:
        slot = tl.load(slot_mapping + row)
        if slot >= 0:
            kv_head = head - num_heads
            block, token = slot // TOKENS, slot % TOKENS
            index = block * block_stride + (token * num_kv_heads + kv_head) * size
            scale_index = block * scale_stride + kv_head * TOKENS + token
            rotation = k_rotations + row * size
            key = _rotated(k + row * k_stride + kv_head * size, k_weight, rotation, half, eps, BLOCK)
            v += row * v_stride + kv_head * size
            scale = _norm_scale(v, v_weight, size, eps, BLOCK)
            value = _load_normed(v, v_weight, columns, scale, size)
            _store_head(key, keys, index, key_scales, scale_index, size, BLOCK)
            _store_head(value, values, index, value_scales, scale_index, size, BLOCK)


def rope_and_store_kv(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotations: Rotations,
    slot_mapping: Tensor,
    cache: LayerCache,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Norm and rotate q and k, store k and v at `slot_mapping` [T], and return q: see the interface.

    The cache's keys and values are [B, N, KH, D], with scales [B, KH, N] if they have 8 bits.
    """
    check_heads(q, k, v, rotations, slot_mapping, cache, norms)
    norms = norms or HeadNorms(None, None, None, 0.0)
    num_rows, num_heads, size = q.shape
    num_kv_heads = 0 if k is None else k.shape[1]
    q, q_weight = _of_heads(q, norms.q, norms.eps)
    k, k_weight = (q, None) if k is None else _of_heads(k, norms.k, norms.eps)
    v, v_weight = (q, None) if v is None else _of_heads(v, norms.v, norms.eps)
    out = torch.empty((num_rows, num_heads, size), dtype=q.dtype, device=q.device)
    if num_rows:
        _rope_and_store_kv[(num_rows, num_heads + num_kv_heads)](
            q,
            k,
            v,
            out,
            rotations.q,
            rotations.k,
            q_weight,
            k_weight,
            v_weight,
            slot_mapping,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            cache.keys.stride(0),
            0 if cache.key_scales is None else cache.key_scales.stride(0),
            num_heads,
            num_kv_heads,
            size // 2,
            norms.eps,
            TOKENS=cache.keys.shape[1],
            BLOCK=triton.next_power_of_2(size),
            num_warps=1,  # a lane takes four numbers of a head of 128
            **LAUNCH_OPTIONS,
        )
    return out


def _of_heads(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Return x [T, heads, D], and the weight of the norm of each head. A norm of all heads at once is done first."""
    assert x.stride(2) == 1
    assert x.shape[1] == 1 or x.stride(1) == x.shape[2]
    if weight is None or len(weight) == x.shape[2]:
        return x, weight
    return rms_norm(x.flatten(1), weight, eps).view(x.shape), None
