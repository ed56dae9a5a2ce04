"""The product with fixed weights: the tile of rows, columns and inputs is the same for any number of rows.

A row of the result is added up along the inputs in steps of the same size, in ascending order, so its bits depend on
that row alone (batch invariance). The inputs of some weights are cut into splits, each with sums of its own that are
added up in order: by one program, or if there are few tiles, by one program for each split and a second kernel. Tiles
that share columns run at about the same time, so that weights are read from memory once for several tiles of rows.
Packed weights are dequantized to the dtype of x inside the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.packed_matrix import PackedMatrix
from engine.kernels.triton.tiles import LAUNCH_OPTIONS, LinearTiles

SUM_COLUMNS = 1024  # of a program that adds up splits
ROW_GROUP = 8  # tiles of rows that share columns at about the same time


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
    """Return the weights [COLUMNS, INPUTS] from input `start` on, dequantized to `dtype`."""
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
        # Load one scale for each group: with one for each input, the loads would be most of the work.
        groups = start // SCALE_INPUTS + tl.arange(0, INPUTS // SCALE_INPUTS)
        index = columns[:, None] * scales_stride + groups[None, :]
        has_group = has_column & (groups[None, :] * SCALE_INPUTS < num_inputs)
        shape: tl.constexpr = (columns.shape[0], INPUTS // SCALE_INPUTS, SCALE_INPUTS)
        numbers = tl.reshape(codes.to(tl.float32), shape)
        numbers *= tl.load(scales + index, mask=has_group, other=0.0).to(tl.float32)[:, :, None]
        if HAS_MINIMUM:
            numbers += tl.load(minima + index, mask=has_group, other=0.0).to(tl.float32)[:, :, None]
        codes = tl.reshape(numbers, (columns.shape[0], INPUTS)).to(dtype)
    return codes


@triton.jit
def _tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return the rows and columns of a program. Programs that share columns have adjacent numbers."""
    program = tl.program_id(0)
    programs_of_group = GROUP * tl.cdiv(num_columns, COLUMNS)
    first_row_tile = program // programs_of_group * GROUP
    group_size = tl.minimum(tl.cdiv(num_rows, ROWS) - first_row_tile, GROUP)
    row_tile = first_row_tile + program % programs_of_group % group_size
    column_tile = program % programs_of_group // group_size
    rows = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return rows, (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)


@triton.jit
def _store(sums, bias, out, rows, columns, has_row, num_columns, stride, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr):
    has_column = columns < num_columns
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=has_column, other=0.0).to(tl.float32)[None, :]
    pointers = out + rows[:, None] * stride + columns[None, :]
    mask = has_row & has_column[None, :]
    if ADDS:  # the product is rounded first, as if it had been stored
        rounded = sums.to(out.dtype.element_ty).to(tl.float32)
        sums = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + rounded
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    weights,
    scales,
    minima,
    bias,
    out,
    partial,
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
    ADDS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute x W^T + b to `out`, on a grid (tiles): each program computes all splits of the inputs in order.

    With IS_SPLIT, the grid is (tiles, splits): each program computes one split, to `partial` [SPLITS, T, M].
    """
    rows, columns = _tile(num_rows, num_columns, ROWS, COLUMNS, GROUP)
    inputs = tl.arange(0, INPUTS)
    has_row = rows[:, None] < num_rows
    split_inputs = tl.cdiv(tl.cdiv(num_inputs, INPUTS), SPLITS) * INPUTS
    first = tl.program_id(1) if IS_SPLIT else 0
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for split in range(first, first + 1 if IS_SPLIT else SPLITS):
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(split * split_inputs, tl.minimum((split + 1) * split_inputs, num_inputs), INPUTS):
            k = start + inputs
            a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=has_row & (k[None, :] < num_inputs), other=0.0)
            b = _load_weights(
                weights, scales, minima, columns, start, num_columns, num_inputs, weights_stride, scales_stride,
                x.dtype.element_ty, BITS, SCALE_INPUTS, HAS_MINIMUM, INPUTS
            )  # fmt: skip
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        total += sums
    if IS_SPLIT:
        partial += tl.program_id(1).to(tl.int64) * num_rows * num_columns
        _store(total, bias, partial, rows, columns, has_row, num_columns, num_columns, False, False)
    else:
        _store(total, bias, out, rows, columns, has_row, num_columns, out_stride, HAS_BIAS, ADDS)


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
    partial,
    bias,
    out,
    num_rows,
    num_columns,
    out_stride,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the splits in `partial` to `out`, on a grid (rows, pieces of the columns)."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (columns < num_columns)[None, :]
    total = tl.zeros((1, COLUMNS), dtype=tl.float32)
    for split in range(SPLITS):
        index = (split * num_rows + rows)[:, None] * num_columns + columns[None, :]
        total += tl.load(partial + index, mask=mask, other=0.0)
    _store(total, bias, out, rows, columns, rows[:, None] < num_rows, num_columns, out_stride, HAS_BIAS, ADDS)


def linear(
    x: Tensor,
    weights: Tensor | PackedMatrix,
    bias: Tensor | None,
    tiles: LinearTiles,
    out: Tensor,
    *,
    adds: bool = False,
) -> None:
    """Store x W^T + b for x [T, K] and weights [M, K] in `out` [T, M], or add it there. Sums are float32."""
    num_rows, num_columns = len(x), len(weights)
    if isinstance(weights, PackedMatrix):
        codes, scales, minima = weights.codes, weights.scales, weights.minima
        bits, group = weights.bits, weights.group
    else:
        codes, scales, minima, bits, group = weights, weights, None, 16, 1
    assert x.stride(1) == codes.stride(1) == scales.stride(1) == out.stride(1) == 1
    assert minima is None or minima.stride() == scales.stride()
    assert tiles.inputs % group == 0
    if not num_rows:
        return
    num_tiles = triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_columns, tiles.columns)
    is_split = tiles.splits > 1 and num_tiles < tiles.programs  # both ways give the same bits
    partial = out
    if is_split:
        partial = torch.empty((tiles.splits, num_rows, num_columns), dtype=torch.float32, device=x.device)
    flags = {"HAS_BIAS": bias is not None, "ADDS": adds, "SPLITS": tiles.splits}
    bias = bias if bias is not None else x
    _linear[(num_tiles, tiles.splits if is_split else 1)](
        x,
        codes,
        scales,
        minima if minima is not None else scales,
        bias,
        out,
        partial,
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
        IS_SPLIT=is_split,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        INPUTS=tiles.inputs,
        GROUP=ROW_GROUP,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **flags,
        **LAUNCH_OPTIONS,
    )
    if is_split:
        grid = (num_rows, triton.cdiv(num_columns, SUM_COLUMNS))
        sizes = (num_rows, num_columns, out.stride(0))
        _add_splits[grid](partial, bias, out, *sizes, **flags, COLUMNS=SUM_COLUMNS, **LAUNCH_OPTIONS)
