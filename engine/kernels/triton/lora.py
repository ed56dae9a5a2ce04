"""LoRA: y += B (A x), with the adapter of each row (Hu et al. 2021; for many adapters, Chen et al. 2023).

One launch computes t = A x in float32, and one adds B t. A program takes one row after the other, in tiles of one size,
so the bits of a row depend on that row and its adapter alone. Rows without an adapter are skipped.

Rows are not computed in tiles, because adjacent rows may have different adapters: each row reads its whole adapter. If
many rows of a prompt share one, caches serve most of the reads. For all of Llama-3-8B, rank 16 is 84 MB: half a percent
of the weights for each decoded token, besides 256 launches a step, and about half as long again for a prompt. These
figures are computed for an H100, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import LoraWeights
from engine.kernels.triton.tiles import LAUNCH_OPTIONS

SHRINK_RANKS, SHRINK_INPUTS = 4, 1024  # of one step of a program that computes t
EXPAND_RANKS, EXPAND_COLUMNS = 16, 512  # of one step of a program that adds B t
ROWS_PER_GROUP = 64  # the rows of a program are those of the batch divided by this,
MAX_GROUP = 16  # between 1 and this


@triton.jit
def _slot_and_rank(ranks, lora_slots, row, projection, num_projections):
    """Return the slot of a row's adapter and its rank for a projection, 0 if the row has no adapter."""
    slot = tl.load(lora_slots + row)
    return slot, tl.load(ranks + slot * num_projections + projection, mask=slot >= 0, other=0)


@triton.jit(do_not_specialize=["num_rows", "group"], do_not_specialize_on_alignment=["lora_slots"])
def _shrink(
    x,
    a,
    ranks,
    lora_slots,
    inner,
    num_rows,
    group,
    num_inputs,
    max_rank,
    x_stride,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute A x to `inner` [T, projections, R], on a grid (groups of rows, projections, pieces of the ranks)."""
    projection, num_projections = tl.program_id(1), tl.num_programs(1)
    first_rank = tl.program_id(2) * RANKS
    rows_of_a = first_rank + tl.arange(0, RANKS)
    first_row = tl.program_id(0).to(tl.int64) * group
    for row in range(first_row, tl.minimum(first_row + group, num_rows)):
        slot, rank = _slot_and_rank(ranks, lora_slots, row, projection, num_projections)
        if first_rank < rank:
            has_rank = rows_of_a < rank
            weights = a + ((slot * num_projections + projection) * max_rank + rows_of_a)[:, None] * num_inputs
            products = tl.zeros((RANKS, INPUTS), dtype=tl.float32)
            for start in range(0, num_inputs, INPUTS):
                k = start + tl.arange(0, INPUTS)
                has_input = k < num_inputs
                numbers = tl.load(x + row * x_stride + k, mask=has_input, other=0.0).to(tl.float32)
                some = tl.load(weights + k[None, :], mask=has_rank[:, None] & has_input[None, :], other=0.0)
                products += some.to(tl.float32) * numbers[None, :]
            pointers = inner + (row * num_projections + projection) * max_rank + rows_of_a
            tl.store(pointers, tl.sum(products, axis=1), mask=has_rank)


@triton.jit(do_not_specialize=["num_rows", "group"], do_not_specialize_on_alignment=["lora_slots"])
def _expand(
    inner,
    b,
    ranks,
    lora_slots,
    tiles,
    out,
    num_rows,
    group,
    num_projections,
    max_rank,
    num_columns,
    out_stride,
    UNIT: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add B t to `out`, on a grid (groups of rows, tiles of columns).

    The first column of each projection is a multiple of UNIT.
    """
    tile = tiles + 3 * tl.program_id(1)
    projection = tl.load(tile)
    columns = tl.multiple_of(tl.load(tile + 1), UNIT) + tl.arange(0, COLUMNS)
    has_column = columns < tl.multiple_of(tl.load(tile + 2), UNIT)
    first_row = tl.program_id(0).to(tl.int64) * group
    for row in range(first_row, tl.minimum(first_row + group, num_rows)):
        slot, rank = _slot_and_rank(ranks, lora_slots, row, projection, num_projections)
        if rank > 0:
            sums = tl.zeros((COLUMNS,), dtype=tl.float32)
            for start in range(0, rank, RANKS):
                k = start + tl.arange(0, RANKS)
                has_rank = k < rank  # the rest is garbage
                t = tl.load(inner + (row * num_projections + projection) * max_rank + k, mask=has_rank, other=0.0)
                weights = b + (slot * max_rank + k)[:, None] * num_columns + columns[None, :]
                some = tl.load(weights, mask=has_rank[:, None] & has_column[None, :], other=0.0)
                sums += tl.sum(some.to(tl.float32) * t[:, None], axis=0)
            pointers = out + row * out_stride + columns
            rounded = sums.to(out.dtype.element_ty).to(tl.float32)  # as `linear` adds to a residual stream
            sums = tl.load(pointers, mask=has_column, other=0.0).to(tl.float32) + rounded
            tl.store(pointers, sums.to(out.dtype.element_ty), mask=has_column)


def column_tiles(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Cut the columns of each projection into tiles.

    Returns int32 [tiles, 3]: index of the projection, first column of the tile, end of the projection.
    """
    tiles, first = [], 0
    for projection, size in enumerate(sizes):
        tiles += [(projection, column, first + size) for column in range(first, first + size, EXPAND_COLUMNS)]
        first += size
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def add_lora(x: Tensor, out: Tensor, weights: LoraWeights, lora_slots: Tensor, tiles: Tensor) -> None:
    """Add the adapter of each row, B (A x), to out [T, M], in place, for x [T, K].

    `lora_slots`, int64 [T], holds the slot of each row's adapter, -1 for none; `tiles` are the `column_tiles`.
    The host does not wait for the device, and the grids depend on shapes alone.
    """
    num_rows, num_inputs = x.shape
    _, num_projections, max_rank, _ = weights.a.shape
    assert x.stride(1) == out.stride(1) == lora_slots.stride(0) == 1
    assert all(tensor.is_contiguous() for tensor in (weights.a, weights.b, weights.ranks))
    if not num_rows:
        return
    group = min(max(1, num_rows // ROWS_PER_GROUP), MAX_GROUP)
    num_groups = triton.cdiv(num_rows, group)
    inner = torch.empty((num_rows, num_projections, max_rank), dtype=torch.float32, device=x.device)
    _shrink[(num_groups, num_projections, triton.cdiv(max_rank, SHRINK_RANKS))](
        x,
        weights.a,
        weights.ranks,
        lora_slots,
        inner,
        num_rows,
        group,
        num_inputs,
        max_rank,
        x.stride(0),
        RANKS=SHRINK_RANKS,
        INPUTS=SHRINK_INPUTS,
        **LAUNCH_OPTIONS,
    )
    _expand[(num_groups, len(tiles))](
        inner,
        weights.b,
        weights.ranks,
        lora_slots,
        tiles,
        out,
        num_rows,
        group,
        num_projections,
        max_rank,
        out.shape[1],
        out.stride(0),
        UNIT=math.gcd(16, *weights.sizes),
        RANKS=EXPAND_RANKS,
        COLUMNS=EXPAND_COLUMNS,
        **LAUNCH_OPTIONS,
    )
