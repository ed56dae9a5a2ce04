"""LoRA: y += B (A x), with the adapter of each row (Hu et al. 2021; for many adapters, Chen et al. 2023).

One launch computes t = A x in float32, and one adds B t. A program takes a tile of rows, and one after the other the
adapters that any of them has: the products are those of a whole tile, in which the rows of other adapters are zero.
Rows of the same adapter are adjacent, so a tile rarely has more than two, and its rows share what is read of the
matrices. All products have the same shape and the inputs are added up in the same order, so the bits of a row depend on
that row and its adapter alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.parts.triton.tiles import LAUNCH_OPTIONS

ROWS = tl.constexpr(16)  # of a tile
RANKS = tl.constexpr(16)  # of a program that computes t, and of a step of one that adds B t
INPUTS = tl.constexpr(128)  # of a step of a program that computes t,
SPLIT_INPUTS = tl.constexpr(1024)  # which takes this many at most: with few rows, there would be too few programs
COLUMNS = tl.constexpr(128)  # of a program that adds B t


@triton.jit
def _load_slots(lora_slots, num_rows):
    """Return the rows of this program's tile, and the slot of the adapter of each, -1 for none."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return rows, tl.load(lora_slots + rows, mask=rows < num_rows, other=-1)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["lora_slots"])
def _shrink(x, a, ranks, lora_slots, inner, num_rows, num_inputs, max_rank, x_stride):
    """Compute A x for each split of the inputs to `inner` [splits, T, projections, R].

    Grid (tiles of rows, projections, splits of the inputs x pieces of the ranks).
    """
    projection, num_projections = tl.program_id(1), tl.num_programs(1)
    num_pieces = tl.cdiv(max_rank, RANKS)
    first_rank = tl.program_id(2) % num_pieces * RANKS
    split = tl.program_id(2) // num_pieces
    first_input = split * SPLIT_INPUTS
    rows_of_a = first_rank + tl.arange(0, RANKS)
    rows, slots = _load_slots(lora_slots, num_rows)
    slot = tl.max(slots, axis=0)
    while slot >= 0:
        is_own = slots == slot
        rank = tl.load(ranks + slot * num_projections + projection)
        if first_rank < rank:
            has_rank = rows_of_a < rank  # the rest is garbage
            weights = a + ((slot * num_projections + projection) * max_rank + rows_of_a)[:, None] * num_inputs
            sums = tl.zeros((ROWS, RANKS), dtype=tl.float32)
            for start in range(first_input, tl.minimum(first_input + SPLIT_INPUTS, num_inputs), INPUTS):
                k = start + tl.arange(0, INPUTS)
                has_input = k[None, :] < num_inputs
                numbers = tl.load(
                    x + rows[:, None] * x_stride + k[None, :], mask=is_own[:, None] & has_input, other=0.0
                )
                some = tl.load(weights + k[None, :], mask=has_rank[:, None] & has_input, other=0.0)
                sums = tl.dot(numbers, tl.trans(some), sums, input_precision="ieee")
            first = ((split * num_rows + rows) * num_projections + projection) * max_rank
            tl.store(inner + first[:, None] + rows_of_a[None, :], sums, mask=is_own[:, None] & has_rank[None, :])
        slots = tl.where(is_own, -1, slots)
        slot = tl.max(slots, axis=0)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["lora_slots"])
def _expand(
    inner,
    b,
    ranks,
    lora_slots,
    tiles,
    out,
    num_rows,
    num_splits,
    num_projections,
    max_rank,
    num_columns,
    out_stride,
    UNIT: tl.constexpr,
):
    """Add B t to `out`, on a grid (tiles of rows, tiles of columns). t is the sum over the splits of `inner`, in order.

    The first column of each projection is a multiple of UNIT.
    """
    tile = tiles + 3 * tl.program_id(1)
    projection = tl.load(tile)
    columns = tl.multiple_of(tl.load(tile + 1), UNIT) + tl.arange(0, COLUMNS)
    has_column = columns < tl.multiple_of(tl.load(tile + 2), UNIT)
    rows, slots = _load_slots(lora_slots, num_rows)
    slot = tl.max(slots, axis=0)
    while slot >= 0:
        is_own = slots == slot
        rank = tl.load(ranks + slot * num_projections + projection)
        if rank > 0:
            sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for start in range(0, rank, RANKS):
                k = start + tl.arange(0, RANKS)
                has_rank = k < rank  # the rest is garbage
                t = tl.zeros((ROWS, RANKS), dtype=tl.float32)
                for split in range(num_splits):
                    first = ((split * num_rows + rows) * num_projections + projection) * max_rank
                    has_t = is_own[:, None] & has_rank[None, :]
                    t += tl.load(inner + first[:, None] + k[None, :], mask=has_t, other=0.0)
                weights = b + (slot * max_rank + k)[:, None] * num_columns + columns[None, :]
                some = tl.load(weights, mask=has_rank[:, None] & has_column[None, :], other=0.0)
                sums = tl.dot(t, some.to(tl.float32), sums, input_precision="ieee")
            pointers = out + rows[:, None] * out_stride + columns[None, :]
            mask = is_own[:, None] & has_column[None, :]
            rounded = sums.to(out.dtype.element_ty).to(tl.float32)  # as `linear` adds to a residual stream
            sums = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + rounded
            tl.store(pointers, sums.to(out.dtype.element_ty), mask=mask)
        slots = tl.where(is_own, -1, slots)
        slot = tl.max(slots, axis=0)


def column_tiles(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Cut the columns of each projection into tiles.

    Returns int32 [tiles, 3]: index of the projection, first column of the tile, end of the projection.
    """
    tiles, first = [], 0
    for projection, size in enumerate(sizes):
        tiles += [(projection, column, first + size) for column in range(first, first + size, COLUMNS.value)]
        first += size
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def add_lora(
    x: Tensor, out: Tensor, a: Tensor, b: Tensor, ranks: Tensor, lora_slots: Tensor, sizes: Sequence[int], tiles: Tensor
) -> None:
    """Add the adapter of each row, as `engine.parts.lora.layers.LoraLayer` describes. `tiles` are the `column_tiles`.

    If `lora_slots` is empty, nothing is launched. The host does not wait for the device, and the grids depend on shapes
    alone.
    """
    num_rows, num_inputs = x.shape
    _, num_projections, max_rank, _ = a.shape
    assert len(lora_slots) in (0, num_rows)
    if not len(lora_slots):
        return
    assert x.stride(1) == out.stride(1) == lora_slots.stride(0) == 1
    assert all(tensor.is_contiguous() for tensor in (a, b, ranks))
    row_tiles, num_splits = triton.cdiv(num_rows, ROWS.value), triton.cdiv(num_inputs, SPLIT_INPUTS.value)
    inner = torch.empty((num_splits, num_rows, num_projections, max_rank), dtype=torch.float32, device=x.device)
    _shrink[(row_tiles, num_projections, num_splits * triton.cdiv(max_rank, RANKS.value))](
        x,
        a,
        ranks,
        lora_slots,
        inner,
        num_rows,
        num_inputs,
        max_rank,
        x.stride(0),
        num_warps=2,
        num_stages=4,
        **LAUNCH_OPTIONS,
    )
    _expand[(row_tiles, len(tiles))](
        inner,
        b,
        ranks,
        lora_slots,
        tiles,
        out,
        num_rows,
        num_splits,
        num_projections,
        max_rank,
        out.shape[1],
        out.stride(0),
        UNIT=math.gcd(16, *sizes),
        **LAUNCH_OPTIONS,
    )
