"""The product with fixed weights: one tile of rows, columns and inputs whatever the number of rows.

A row of the result is added up along the inputs in steps of the same size, in ascending order, so its bits depend on
that row alone (batch invariance). Tiles that share columns are near each other in time, so that weights are read from
memory once for several tiles of rows. Packed weights become numbers of the type of x on their way into the product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.packed import PackedMatrix
from engine.kernels.gpu.tiles import LAUNCH_OPTIONS, LinearTiles

ROW_GROUP = 8  # tiles of rows that go through the columns together


@triton.jit
def _load_weights(
    weights,
    scales,
    minima,
    columns,
    start,
    num_columns,
    num_inputs,
    weights_stride,
    scales_stride,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Weights [COLUMNS, INPUTS] from input `start` on."""
    k = start + tl.arange(0, INPUTS)
    has_column = columns[:, None] < num_columns
    mask = has_column & (k[None, :] < num_inputs)
    if BITS == 4:
        byte = start // 2 + tl.arange(0, INPUTS // 2)
        has_byte = has_column & (byte[None, :] < num_inputs // 2)
        packed = tl.load(weights + columns[:, None] * weights_stride + byte[None, :], mask=has_byte, other=0)
        codes = tl.interleave(packed & 15, packed >> 4)
    else:
        codes = tl.load(weights + columns[:, None] * weights_stride + k[None, :], mask=mask, other=0)
    if BITS < 16:
        place = columns[:, None] * scales_stride + k[None, :] // SCALE_INPUTS
        numbers = codes.to(tl.float32) * tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_MINIMUM:
            numbers += tl.load(minima + place, mask=mask, other=0.0).to(tl.float32)
        codes = numbers.to(dtype)
    return codes


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    weights,
    scales,
    minima,
    bias,
    out,
    num_rows,
    num_columns,
    num_inputs,
    x_stride,
    weights_stride,
    scales_stride,
    out_stride,
    BITS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    num_column_tiles = tl.cdiv(num_columns, COLUMNS)
    programs_of_group = GROUP * num_column_tiles
    first_row_tile = program // programs_of_group * GROUP
    group_size = tl.minimum(num_row_tiles - first_row_tile, GROUP)
    row_tile = first_row_tile + program % programs_of_group % group_size
    column_tile = program % programs_of_group // group_size
    rows = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inputs = tl.arange(0, INPUTS)
    has_row = rows[:, None] < num_rows
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        k = start + inputs
        a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=has_row & (k[None, :] < num_inputs), other=0.0)
        b = _load_weights(
            weights, scales, minima, columns, start, num_columns, num_inputs, weights_stride, scales_stride,
            x.dtype.element_ty, BITS, SCALE_INPUTS, HAS_MINIMUM, INPUTS
        )  # fmt: skip
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    place = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=has_row & (columns[None, :] < num_columns))


def linear(x: Tensor, weights: Tensor | PackedMatrix, bias: Tensor | None, tiles: LinearTiles, out: Tensor) -> None:
    """x [T, K] W^T + b for weights [M, K], to `out` [T, M] in its type; sums are float32."""
    num_rows, num_columns = len(x), len(weights)
    if isinstance(weights, PackedMatrix):
        codes, scales, minima = weights.codes, weights.scales, weights.minima
        bits, group = weights.bits, weights.group
    else:
        codes, scales, minima, bits, group = weights, weights, None, 16, 1
    assert x.stride(1) == codes.stride(1) == scales.stride(1) == out.stride(1) == 1
    assert minima is None or minima.stride() == scales.stride()
    if num_rows:
        grid = (triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_columns, tiles.columns),)
        _linear[grid](
            x,
            codes,
            scales,
            minima if minima is not None else scales,
            bias if bias is not None else x,
            out,
            num_rows,
            num_columns,
            x.shape[1],
            x.stride(0),
            codes.stride(0),
            scales.stride(0),
            out.stride(0),
            BITS=bits,
            SCALE_INPUTS=group,
            HAS_MINIMUM=minima is not None,
            HAS_BIAS=bias is not None,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            INPUTS=tiles.inputs,
            GROUP=ROW_GROUP,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **LAUNCH_OPTIONS,
        )
