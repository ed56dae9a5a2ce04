"""Mixture of experts (Shazeer et al. 2017): the choice of experts, products grouped by expert, and sums of results.

Pairs of a row and an expert are numbered row by row: pair t * k + j is row t and its expert j, in descending order of
scores. A second list has the pairs sorted by expert. A product cuts the pairs of each expert into tiles of rows; how
many there are is known on the device only, so there are programs for as many as there may be, of which the rest ends at
once. Tiles are added up as in `linear`, so a pair's bits do not depend on other pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.interface import ExpertLinearOp, LinearOp
from engine.parts.triton.linear import _store, _sum, _tile
from engine.parts.triton.packed_matrix import PackedMatrix
from engine.parts.triton.rows import ROW_COLUMNS
from engine.parts.triton.tiles import EXPERTS_OF_ROW, LAUNCH_OPTIONS, LinearTiles

SORTED_PAIRS = 2048  # that a program sorts at a time
SMALLEST_SUM = tl.constexpr(1e-20)


@dataclass(frozen=True)
class PairsByExpert:
    """The pairs that products take."""

    pairs: Tensor  # int32 [P], sorted by expert
    ends: Tensor  # int32 [E]: for each expert, where its pairs end in `pairs`
    num_rows: int  # about as many as an expert has


@dataclass(frozen=True)
class TritonRouting:
    """The experts of each row, and the weights of their results."""

    weights: Tensor  # float32 [T, k]
    pairs: PairsByExpert


@dataclass(frozen=True)
class ExpertMatrices:
    """The weights of all experts [E * M, K], one expert after the other; in several parts, or one."""

    num_experts: int
    parts: list[Tensor | PackedMatrix]


@triton.jit
def _highest(scores, columns, NUM: tl.constexpr):
    """Return the highest score and its column, the lowest of several."""
    highest = tl.max(scores, axis=0)
    return highest, tl.min(tl.where(scores == highest, columns, NUM - 1), axis=0)


@triton.jit
def _group_scores(
    scores, columns, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TAKES_TWO: tl.constexpr, GROUPS: tl.constexpr
):
    """Return the score of each group [GROUPS]: the highest of its experts, or the sum of the two highest."""
    groups = tl.arange(0, GROUPS)
    found = tl.full((GROUPS,), float("-inf"), tl.float32)
    for group in range(NUM_GROUPS):
        its_scores = tl.where(columns // GROUP_SIZE == group, scores, float("-inf"))
        score, best = _highest(its_scores, columns, NUM_GROUPS * GROUP_SIZE)
        if TAKES_TWO:
            score += tl.max(tl.where(columns == best, float("-inf"), its_scores), axis=0)
        found = tl.where(groups == group, score, found)
    return found


@triton.jit
def _of_best_groups(
    choice,
    columns,
    group_scores,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_BEST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return the scores, with -inf for experts whose group is none of the best."""
    groups = tl.arange(0, GROUPS)
    is_kept = columns < 0
    for _ in range(NUM_BEST):
        _score, best = _highest(group_scores, groups, NUM_GROUPS)
        is_kept |= columns // GROUP_SIZE == best
        group_scores = tl.where(groups == best, float("-inf"), group_scores)
    return tl.where(is_kept, choice, float("-inf"))


@triton.jit
def _route(
    logits,
    bias,
    expert_scales,
    weights,
    experts,
    stride,
    scale,
    IS_SIGMOID: tl.constexpr,
    NORMALIZES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_BEST_GROUPS: tl.constexpr,
    TAKES_TWO: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Choose the experts of one row, and their weights."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, EXPERTS)
    is_expert = columns < NUM_EXPERTS
    numbers = tl.load(logits + row * stride + columns, mask=is_expert, other=float("-inf"))
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-numbers))
    else:
        powers = tl.exp(numbers - tl.max(numbers, axis=0))
        scores = powers / tl.sum(powers, axis=0)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + columns, mask=is_expert, other=0.0)
    choice = tl.where(is_expert & (choice > float("-inf")), choice, float("-inf"))  # NaN has no place among others
    if NUM_GROUPS > 1:
        group_size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
        group_scores = _group_scores(choice, columns, NUM_GROUPS, group_size, TAKES_TWO, GROUPS)
        choice = _of_best_groups(choice, columns, group_scores, NUM_GROUPS, group_size, NUM_BEST_GROUPS, GROUPS)
    places = tl.arange(0, CHOSEN)
    chosen = tl.zeros((CHOSEN,), tl.int32)
    found = tl.zeros((CHOSEN,), tl.float32)
    total = 0.0
    for place in range(NUM_CHOSEN):
        score, best = _highest(choice, columns, NUM_EXPERTS)
        score = tl.sum(tl.where(columns == best, scores, 0.0), axis=0)
        chosen = tl.where(places == place, best, chosen)
        found = tl.where(places == place, score, found)
        total += score
        choice = tl.where(columns == best, float("-inf"), choice)
    if NORMALIZES:
        found = found / (total + SMALLEST_SUM)
    found *= scale
    is_place = places < NUM_CHOSEN
    if expert_scales is not None:
        found *= tl.load(expert_scales + chosen, mask=is_place, other=0.0)
    tl.store(weights + row * NUM_CHOSEN + places, found, mask=is_place)
    tl.store(experts + row * NUM_CHOSEN + places, chosen, mask=is_place)


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_pairs(experts, pairs, ends, num_pairs, PAIRS: tl.constexpr):
    """Write the pairs of one expert, in ascending order, behind those of the experts before it."""
    expert = tl.program_id(0)
    num_before = tl.zeros((PAIRS,), tl.int32)
    for start in range(0, num_pairs, PAIRS):
        index = start + tl.arange(0, PAIRS)
        num_before += (tl.load(experts + index, mask=index < num_pairs, other=expert) < expert).to(tl.int32)
    first = tl.sum(num_before, axis=0)
    for start in range(0, num_pairs, PAIRS):
        index = start + tl.arange(0, PAIRS)
        is_its = (tl.load(experts + index, mask=index < num_pairs, other=-1) == expert).to(tl.int32)
        places = first + tl.cumsum(is_its, axis=0) - 1
        tl.store(pairs + places, index, mask=is_its > 0)
        first += tl.sum(is_its, axis=0)
    tl.store(ends + expert, first)


def route(
    logits: Tensor, router: RouterSpec, bias: Tensor | None = None, expert_scales: Tensor | None = None
) -> TritonRouting:
    """Choose the experts of each row by its logits, float32 [T, E], and sort the pairs by expert."""
    num_rows, num_experts = logits.shape
    num_chosen = router.num_experts_per_tok
    weights = torch.empty((num_rows, num_chosen), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((num_rows, num_chosen), dtype=torch.int32, device=logits.device)
    pairs = torch.empty(num_rows * num_chosen, dtype=torch.int32, device=logits.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=logits.device)
    assert num_experts == router.num_experts
    assert all(vector is None or vector.shape == (num_experts,) for vector in (bias, expert_scales))
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    if num_rows:
        _route[(num_rows,)](
            logits,
            bias,
            expert_scales,
            weights,
            chosen,
            logits.stride(0),
            router.scale,
            IS_SIGMOID=router.scoring == "sigmoid",
            NORMALIZES=router.normalize,
            NUM_EXPERTS=num_experts,
            NUM_CHOSEN=num_chosen,
            NUM_GROUPS=router.num_groups,
            NUM_BEST_GROUPS=router.topk_group,
            TAKES_TWO=router.group_score == "top2",
            EXPERTS=triton.next_power_of_2(num_experts),
            CHOSEN=triton.next_power_of_2(num_chosen),
            GROUPS=triton.next_power_of_2(router.num_groups),
            num_warps=1,
            **LAUNCH_OPTIONS,
        )
    _sort_pairs[(num_experts,)](chosen, pairs, ends, len(pairs), PAIRS=SORTED_PAIRS, num_warps=8, **LAUNCH_OPTIONS)
    return TritonRouting(weights, PairsByExpert(pairs, ends, EXPERTS_OF_ROW * num_rows // num_experts))


@triton.jit
def _pairs_of_tile(pairs, ends, tile, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return the expert of a tile, and its pairs [ROWS], -1 for none. If there is no such tile, the expert is -1."""
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < NUM_EXPERTS
    its_ends = tl.load(ends + experts, mask=is_expert, other=0)
    starts = tl.load(ends + experts - 1, mask=is_expert & (experts > 0), other=0)
    num_tiles = tl.where(is_expert, tl.cdiv(its_ends - starts, ROWS), 0)
    tile_ends = tl.cumsum(num_tiles, axis=0)
    is_its = (tile < tile_ends) & (tile >= tile_ends - num_tiles)
    expert = tl.max(tl.where(is_its, experts, -1), axis=0)
    first = tl.sum(tl.where(is_its, starts + (tile - tile_ends + num_tiles) * ROWS, 0), axis=0)
    end = tl.sum(tl.where(is_its, its_ends, 0), axis=0)
    index = first + tl.arange(0, ROWS)
    return expert, tl.load(pairs + index, mask=index < end, other=-1)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _expert_linear(
    x,
    weights,
    scales,
    minima,
    bias,
    out,
    pairs,
    ends,
    num_tiles,
    num_rows,
    num_columns,
    num_inputs,
    num_scale_rows,
    x_stride,
    weights_stride,
    scales_stride,
    group_stride,
    bias_stride,
    out_stride,
    FORMAT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS_OF_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute the products of the pairs of one tile with their expert's weights [M, K], for some columns.

    PAIRS_OF_ROW is the number of pairs that read a row of x.
    """
    tile, columns = _tile(num_tiles, num_columns, COLUMNS)
    expert, its_pairs = _pairs_of_tile(pairs, ends, tile, NUM_EXPERTS, EXPERTS, ROWS)
    if expert >= 0:
        number = expert.to(tl.int64)
        has_row = its_pairs >= 0
        rows = tl.where(has_row, its_pairs // PAIRS_OF_ROW, num_rows).to(tl.int64)
        scales += number * num_scale_rows * scales_stride
        if minima is not None:
            minima += number * num_scale_rows * scales_stride
        sums = _sum(
            x, weights + number * num_columns * weights_stride, scales, minima, rows, columns, 0, num_rows, num_columns,
            num_inputs, x_stride, weights_stride, scales_stride, group_stride, FORMAT, SCALE_COLUMNS, SCALE_INPUTS,
            1, INPUTS
        )  # fmt: skip
        if bias is not None:
            bias += number * bias_stride
        out_rows = its_pairs.to(tl.int64)
        _store(sums, bias, out, out_rows, columns, has_row[:, None], num_columns, out_stride, False)


def expert_linear(matrices: ExpertMatrices, tiles: Sequence[LinearTiles], bias: Tensor | None) -> ExpertLinearOp:
    """Return the operation that multiplies each pair's row with the matrix of its expert."""
    sizes = [len(part) // matrices.num_experts for part in matrices.parts]
    starts = [0, *accumulate(sizes)]

    def product(x: Tensor, routing: TritonRouting) -> Tensor:
        pairs = routing.pairs
        out = torch.empty((len(pairs.pairs), starts[-1]), dtype=x.dtype, device=x.device)
        for part, its_tiles, first, size in zip(matrices.parts, tiles, starts[:-1], sizes, strict=True):
            part_bias = None if bias is None else bias[:, first : first + size]
            _launch(x, part, part_bias, pairs, its_tiles, out[:, first : first + size])
        return out

    return product


def _launch(
    x: Tensor,
    weights: Tensor | PackedMatrix,
    bias: Tensor | None,
    pairs: PairsByExpert,
    tiles: LinearTiles,
    out: Tensor,
) -> None:
    (num_pairs, num_columns), num_experts = out.shape, len(pairs.ends)
    if not num_pairs:
        return
    matrix = weights if isinstance(weights, PackedMatrix) else PackedMatrix.plain(weights)
    assert x.stride(1) == matrix.codes.stride(1) == out.stride(1) == 1
    assert bias is None or bias.stride(1) == 1
    assert matrix.shape == (num_experts * num_columns, x.shape[1])
    assert bias is None or bias.shape == (num_experts, num_columns)
    assert num_pairs % len(x) == 0
    tile = tiles.tile_for(max(1, pairs.num_rows))
    num_tiles = min(num_pairs, num_experts) + num_pairs // tile.rows  # at most
    _expert_linear[(num_tiles * triton.cdiv(num_columns, tile.columns),)](
        x,
        matrix.codes,
        matrix.scales,
        matrix.minima,
        bias,
        out,
        pairs.pairs,
        pairs.ends,
        num_tiles,
        len(x),
        num_columns,
        matrix.num_inputs,
        len(matrix.scales) // num_experts,
        x.stride(0),
        matrix.codes.stride(0),
        *matrix.scales.stride(),
        0 if bias is None else bias.stride(0),
        out.stride(0),
        FORMAT=matrix.format,
        SCALE_COLUMNS=matrix.group_outputs,
        SCALE_INPUTS=matrix.group,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        PAIRS_OF_ROW=num_pairs // len(x),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INPUTS=tiles.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **LAUNCH_OPTIONS,
    )


def head_linear(matrices: Tensor, tiles: LinearTiles) -> LinearOp:
    """Return the operation that multiplies each head of x [T, H * K] with its matrix of [H, M, K]: [T, H * M].

    A head is an expert of all rows.
    """
    num_heads, num_outputs, num_inputs = matrices.shape
    weights = matrices.flatten(0, 1)

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None
        num_rows = len(x)
        numbers = torch.arange(num_rows * num_heads, dtype=torch.int32, device=x.device)
        ends = torch.arange(1, num_heads + 1, dtype=torch.int32, device=x.device) * num_rows
        pairs = PairsByExpert(numbers.view(num_rows, num_heads).t().flatten(), ends, num_rows)
        out = torch.empty((num_rows * num_heads, num_outputs), dtype=x.dtype, device=x.device)
        _launch(x.reshape(-1, num_inputs), weights, None, pairs, tiles, out)
        return out.view(num_rows, -1)

    return product


def first_rows(tiles: LinearTiles, num_experts: int) -> set[int]:
    """Return the numbers of rows from which on another variant of the kernel computes the product."""
    return {-(-first * num_experts // EXPERTS_OF_ROW) for first, _ in tiles.tiles}


@triton.jit
def _combine(
    x, weights, out, x_stride, out_stride, size, NUM_CHOSEN: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(NUM_CHOSEN):
        pair = row * NUM_CHOSEN + place
        values = tl.load(x + pair * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        total += values * tl.load(weights + pair)
    result = total.to(out.dtype.element_ty)
    pointers = out + row * out_stride + columns
    if ADDS:  # rounded first, as if it had been stored
        result = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + result.to(tl.float32)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


def combine_experts(x: Tensor, routing: TritonRouting, residual: Tensor | None = None) -> Tensor:
    """Return the sum of the results x [P, K] of each row's experts, times their weights, or add it to `residual`."""
    num_rows, num_chosen = routing.weights.shape
    out = residual
    if out is None:
        out = torch.empty((num_rows, x.shape[1]), dtype=x.dtype, device=x.device)
    assert x.stride(1) == out.stride(1) == 1
    assert len(x) == num_rows * num_chosen
    assert out.shape == (num_rows, x.shape[1])
    if num_rows:
        grid = (num_rows, triton.cdiv(x.shape[1], ROW_COLUMNS))
        flags = {"NUM_CHOSEN": num_chosen, "ADDS": residual is not None, "BLOCK": ROW_COLUMNS}
        sizes = (x.stride(0), out.stride(0), x.shape[1])
        _combine[grid](x, routing.weights, out, *sizes, **flags, **LAUNCH_OPTIONS)
    return out
