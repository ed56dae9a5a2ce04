"""The product with fixed weights: one tile of rows, columns and inputs whatever the number of rows.

A row of the result is added up along the inputs in steps of the same size, in ascending order, so its bits depend on
that row alone (batch invariance). Tiles that share columns are near each other in time, so that weights are read from
memory once for several tiles of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.tiles import LAUNCH_OPTIONS, LinearTiles

ROW_GROUP = 8  # tiles of rows that go through the columns together


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    weights,
    bias,
    out,
    num_rows,
    num_columns,
    num_inputs,
    x_stride,
    weights_stride,
    out_stride,
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
    has_column = columns[:, None] < num_columns
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        k = start + inputs
        has_input = k[None, :] < num_inputs
        a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=has_row & has_input, other=0.0)
        b = tl.load(weights + columns[:, None] * weights_stride + k[None, :], mask=has_column & has_input, other=0.0)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    place = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=has_row & (columns[None, :] < num_columns))


def linear(x: Tensor, weights: Tensor, bias: Tensor | None, tiles: LinearTiles) -> Tensor:
    """x [T, K] W^T + b for weights [M, K]: [T, M], in the type of x; sums are float32."""
    num_rows, num_columns = len(x), len(weights)
    assert x.stride(1) == weights.stride(1) == 1
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_columns, tiles.columns),)
        _linear[grid](
            x,
            weights,
            bias if bias is not None else weights,
            out,
            num_rows,
            num_columns,
            x.shape[1],
            x.stride(0),
            weights.stride(0),
            out.stride(0),
            HAS_BIAS=bias is not None,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            INPUTS=tiles.inputs,
            GROUP=ROW_GROUP,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **LAUNCH_OPTIONS,
        )
    return out
