"""The product with fixed weights. Few rows have smaller tiles than many, but every number is added up in the same way.

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

from engine.parts.triton.float8 import float4_numbers, float8_numbers, powers_of_two
from engine.parts.triton.packed_matrix import PackedMatrix
from engine.parts.triton.tiles import LAUNCH_OPTIONS, LinearTiles

SUM_COLUMNS = 1024  # of a program that adds up splits
ROW_GROUP = tl.constexpr(8)  # tiles of rows that share columns at about the same time


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
    group_stride,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Return the weights [COLUMNS, INPUTS] from input `start` on, dequantized to `dtype`."""
    k = start + tl.arange(0, INPUTS)
    has_column = columns[:, None] < num_columns
    mask = has_column & (k[None, :] < num_inputs)
    has_two_codes: tl.constexpr = (FORMAT == "int4") | (FORMAT == "float4")  # in a byte
    if has_two_codes:
        byte = start // 2 + tl.arange(0, INPUTS // 2)
        has_byte = has_column & (byte[None, :] < num_inputs // 2)
        packed = tl.load(weights + columns[:, None] * weights_stride + byte[None, :], mask=has_byte, other=0)
        codes = tl.interleave(packed & 15, packed >> 4)
    else:
        codes = tl.load(weights + columns[:, None] * weights_stride + k[None, :], mask=mask, other=0.0)
    if FORMAT != "plain":
        if FORMAT == "float8" and weights.dtype.element_ty == tl.uint8:
            numbers = float8_numbers(codes)
        elif FORMAT == "float4":
            numbers = float4_numbers(codes)
        else:
            numbers = codes.to(tl.float32)
        # Load one scale for each group: with one for each input, the loads would be most of the work.
        num_groups: tl.constexpr = (INPUTS + SCALE_INPUTS - 1) // SCALE_INPUTS
        groups = start // SCALE_INPUTS + tl.arange(0, num_groups)
        index = (columns // SCALE_COLUMNS)[:, None] * scales_stride + groups[None, :] * group_stride
        has_group = has_column & (groups[None, :] * SCALE_INPUTS < num_inputs)
        numbers = tl.reshape(numbers, (columns.shape[0], num_groups, INPUTS // num_groups))
        factors = tl.load(scales + index, mask=has_group, other=0.0)
        factors = powers_of_two(factors) if FORMAT == "float4" else factors.to(tl.float32)
        numbers *= factors[:, :, None]
        if minima is not None:
            numbers += tl.load(minima + index, mask=has_group, other=0.0).to(tl.float32)[:, :, None]
        codes = tl.reshape(numbers, (columns.shape[0], INPUTS)).to(dtype)
    return codes


@triton.jit
def _tile(num_row_tiles, num_columns, COLUMNS: tl.constexpr):
    """Return the tile of rows and the columns of a program. Programs that share columns have adjacent numbers."""
    program = tl.program_id(0)
    programs_of_group = ROW_GROUP * tl.cdiv(num_columns, COLUMNS)
    first_tile = program // programs_of_group * ROW_GROUP
    group_size = tl.minimum(num_row_tiles - first_tile, ROW_GROUP)
    column_tile = program % programs_of_group // group_size
    columns = (column_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    return first_tile + program % programs_of_group % group_size, columns


@triton.jit
def _store(sums, bias, out, rows, columns, has_row, num_columns, stride, ADDS: tl.constexpr):
    has_column = columns < num_columns
    if bias is not None:
        sums += tl.load(bias + columns, mask=has_column, other=0.0).to(tl.float32)[None, :]
    pointers = out + rows[:, None] * stride + columns[None, :]
    mask = has_row & has_column[None, :]
    if ADDS:  # the product is rounded first, as if it had been stored
        rounded = sums.to(out.dtype.element_ty).to(tl.float32)
        sums = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + rounded
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum(
    x,
    weights,
    scales,
    minima,
    rows,
    columns,
    split,
    num_rows,
    num_columns,
    num_inputs,
    x_stride,
    weights_stride,
    scales_stride,
    group_stride,
    FORMAT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Return the sums [ROWS, COLUMNS] of one split of the inputs."""
    inputs = tl.arange(0, INPUTS)
    has_row = rows[:, None] < num_rows
    split_inputs = tl.cdiv(tl.cdiv(num_inputs, INPUTS), SPLITS) * INPUTS
    sums = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(split * split_inputs, tl.minimum((split + 1) * split_inputs, num_inputs), INPUTS):
        k = start + inputs
        a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=has_row & (k[None, :] < num_inputs), other=0.0)
        b = _load_weights(
            weights, scales, minima, columns, start, num_columns, num_inputs, weights_stride, scales_stride,
            group_stride, x.dtype.element_ty, FORMAT, SCALE_COLUMNS, SCALE_INPUTS, INPUTS
        )  # fmt: skip
        sums = tl.dot(a.to(b.dtype), tl.trans(b), sums, input_precision="ieee")
    return sums


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
    group_stride,
    out_stride,
    FORMAT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute x W^T + b to `out`, on a grid (tiles): each program computes all splits of the inputs in order.

    With IS_SPLIT, the grid is (tiles, splits): each program computes one split, to `partial` [SPLITS, T, M].
    """
    tile, columns = _tile(tl.cdiv(num_rows, ROWS), num_columns, COLUMNS)
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if IS_SPLIT or SPLITS == 1:  # a second accumulator would double the registers
        total = _sum(
            x, weights, scales, minima, rows, columns, tl.program_id(1), num_rows, num_columns, num_inputs, x_stride,
            weights_stride, scales_stride, group_stride, FORMAT, SCALE_COLUMNS, SCALE_INPUTS, SPLITS, INPUTS
        )  # fmt: skip
    else:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for split in range(SPLITS):
            total += _sum(
                x, weights, scales, minima, rows, columns, split, num_rows, num_columns, num_inputs, x_stride,
                weights_stride, scales_stride, group_stride, FORMAT, SCALE_COLUMNS, SCALE_INPUTS, SPLITS, INPUTS
            )  # fmt: skip
    has_row = rows[:, None] < num_rows
    if IS_SPLIT:
        partial += tl.program_id(1).to(tl.int64) * num_rows * num_columns
        _store(total, None, partial, rows, columns, has_row, num_columns, num_columns, False)
    else:
        _store(total, bias, out, rows, columns, has_row, num_columns, out_stride, ADDS)


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
    partial,
    bias,
    out,
    num_rows,
    num_columns,
    out_stride,
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
    _store(total, bias, out, rows, columns, rows[:, None] < num_rows, num_columns, out_stride, ADDS)


def _check_sizes(x: Tensor, matrix: PackedMatrix, bias: Tensor | None, out: Tensor) -> None:
    """Check that the tensors of a product fit each other."""
    num_columns, num_inputs = matrix.shape
    assert x.shape[1] == num_inputs
    assert out.shape == (len(x), num_columns)
    assert bias is None or bias.shape == (num_columns,)
    assert x.stride(1) == matrix.codes.stride(1) == out.stride(1) == 1
    assert matrix.minima is None or matrix.minima.stride() == matrix.scales.stride()


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
    if not len(x):
        return
    matrix = weights if isinstance(weights, PackedMatrix) else PackedMatrix.plain(weights)
    num_rows, (num_columns, num_inputs) = len(x), matrix.shape
    _check_sizes(x, matrix, bias, out)
    assert max(matrix.group, tiles.inputs) % min(matrix.group, tiles.inputs) == 0
    tile = tiles.tile_for(num_rows)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns)
    is_split = tiles.splits > 1 and num_tiles < tiles.programs  # both ways give the same bits
    partial = out
    if is_split:
        partial = torch.empty((tiles.splits, num_rows, num_columns), dtype=torch.float32, device=x.device)
    flags = {"ADDS": adds, "SPLITS": tiles.splits}
    _linear[(num_tiles, tiles.splits if is_split else 1)](
        x,
        matrix.codes,
        matrix.scales,
        matrix.minima,
        bias,
        out,
        partial,
        num_rows,
        num_columns,
        num_inputs,
        x.stride(0),
        matrix.codes.stride(0),
        *matrix.scales.stride(),
        out.stride(0),
        FORMAT=matrix.format,
        SCALE_COLUMNS=matrix.group_outputs,
        SCALE_INPUTS=matrix.group,
        IS_SPLIT=is_split,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INPUTS=tiles.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **flags,
        **LAUNCH_OPTIONS,
    )
    if is_split:
        grid = (num_rows, triton.cdiv(num_columns, SUM_COLUMNS))
        sizes = (num_rows, num_columns, out.stride(0))
        _add_splits[grid](partial, bias, out, *sizes, **flags, COLUMNS=SUM_COLUMNS, **LAUNCH_OPTIONS)
