"""Flash attention (Dao et al. 2022) over a paged KV cache, with a split over the keys for decoding.

The query heads that share a KV head (grouped-query attention) are rows of one product. These rows, pairs of token and
query head, are called packed rows. Keys are cut into segments of fixed length aligned to position 0. Each segment gets
a running softmax of its own, and segments are merged in ascending order. With many tiles of rows, one program computes
all segments of a tile (2D grid). With few tiles, or if some are much longer than the others, each segment has a program
of its own and a second kernel merges them (3D grid), if there is memory for the partial results. Both grids run the
same functions on the same numbers in the same order, so a row gets the same bits either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch.inputs import Lengths
from engine.batch.transfer import to_device
from engine.kernels.interface import LayerCache
from engine.kernels.triton.prompt_attention import PromptPlan
from engine.kernels.triton.tiles import LAUNCH_OPTIONS, AttentionTiles

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(100.0)  # 2^100 is finite, and large enough to stand for infinity here
TARGET_PROGRAMS = 1024  # 2.6 times as many as an H100 runs at a time; with fewer, the last ones leave it half idle
MAX_PARTIAL_BYTES = 128 * 2**20  # of results that wait to be merged


@triton.jit
def _empty_softmax(PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Return a running softmax that has seen no key. Merging it with another gives the other's bits."""
    highest = tl.full((PACKED,), float("-inf"), tl.float32)
    return highest, tl.zeros((PACKED,), tl.float32), tl.zeros((PACKED, BLOCK), tl.float32)


@triton.jit
def _partial_rows(kv_head, num_kv_heads, segment, num_segments, held_rows, PACKED: tl.constexpr):
    """Return the rows of `partial` and `states` that hold a segment of this program's tile."""
    index = (tl.program_id(0) * num_kv_heads + kv_head) * num_segments + segment
    return index.to(tl.int64) * held_rows + tl.arange(0, PACKED)


@triton.jit
def _rows(tile, kv_head, q_stride, group_size, PACKED: tl.constexpr, SIZE: tl.constexpr):
    """Return for each packed row its token's index in the tile, its offset in q and out, and whether it exists."""
    packed = tl.arange(0, PACKED)
    rows = packed // group_size
    heads = kv_head * group_size + packed % group_size
    offsets = (tl.load(tile + 1) + rows).to(tl.int64) * q_stride + heads * SIZE
    return rows, offsets, rows < tl.load(tile + 2)


@triton.jit
def _store(out, offsets, has_row, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = has_row[:, None] & (columns < SIZE)[None, :]
    tl.store(out + offsets[:, None] + columns[None, :], rows.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _merge(highest, total, weighted, other_highest, other_total, other_weighted):
    """Merge two running softmaxes. If the second has seen no keys, the first keeps its bits."""
    new_highest = tl.maximum(highest, other_highest)
    pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    shrink = tl.exp2(highest - pivot)
    other_shrink = tl.exp2(other_highest - pivot)
    new_total = total * shrink + other_total * other_shrink
    new_weighted = weighted * shrink[:, None] + other_weighted * other_shrink[:, None]
    return new_highest, new_total, new_weighted


@triton.jit
def _capped(scores, softcap):
    # tanh(x) = 1 - 2 / (e^2x + 1)
    bounded = tl.minimum(scores * (2.0 * LOG2_E / softcap), LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return softcap * (1.0 - 2.0 / (tl.exp2(bounded) + 1.0))


@triton.jit
def _segment(
    q,
    positions,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_head,
    start,
    end,
    num_kv_heads,
    scale,
    softcap,
    window,
    HAS_SCALES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return the running softmax of packed rows q [PACKED, BLOCK] over the keys start .. end of one segment.

    Scores are multiplied by log2(e). `end` is the position after the tile's last row.
    """
    columns = tl.arange(0, BLOCK)
    highest, total, weighted = _empty_softmax(PACKED, BLOCK)
    for offset in range(start, tl.minimum(start + SEGMENT, end), KEYS):
        tokens = offset + tl.arange(0, KEYS)
        has_token = tokens < end
        blocks = tl.load(table + tokens // TOKENS, mask=has_token, other=0).to(tl.int64)
        offsets = ((blocks * TOKENS + tokens % TOKENS) * num_kv_heads + kv_head) * SIZE
        scale_offsets = (blocks * num_kv_heads + kv_head) * TOKENS + tokens % TOKENS
        mask = has_token[:, None] & (columns < SIZE)[None, :]
        k = tl.load(keys + offsets[:, None] + columns[None, :], mask=mask, other=0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SCALES:
            scores *= tl.load(key_scales + scale_offsets, mask=has_token, other=0.0)[None, :]
        scores *= scale
        scores = _capped(scores, softcap) if HAS_SOFTCAP else scores
        scores *= LOG2_E
        visible = tokens[None, :] <= positions[:, None]
        if HAS_WINDOW:
            visible &= tokens[None, :] > positions[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - pivot)
        weights = tl.exp2(scores - pivot[:, None])
        v = tl.load(values + offsets[:, None] + columns[None, :], mask=mask, other=0)
        if HAS_SCALES:  # scales the values: small weights would be lost in float16
            v = v.to(tl.float32) * tl.load(value_scales + scale_offsets, mask=has_token, other=0.0)[:, None]
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        highest = new_highest
    return highest, total, weighted


@triton.jit
def _load_queries(
    q,
    tile,
    kv_head,
    q_stride,
    group_size,
    PACKED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the packed rows of a tile (sequence, first row, number of rows, first position), and their positions."""
    first_position = tl.load(tile + 3)
    rows, offsets, has_row = _rows(tile, kv_head, q_stride, group_size, PACKED, SIZE)
    columns = tl.arange(0, BLOCK)
    positions = tl.where(has_row, first_position + rows, first_position)  # padding must see a key too
    queries = tl.load(
        q + offsets[:, None] + columns[None, :], mask=has_row[:, None] & (columns < SIZE)[None, :], other=0.0
    )
    return queries, positions, offsets, has_row


@triton.jit
def _seen(tile, window, HAS_WINDOW: tl.constexpr, SEGMENT: tl.constexpr):
    """Return the start of the first segment that a tile sees, and the position after the tile's last row."""
    first_position = tl.load(tile + 3)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // SEGMENT * SEGMENT
    return first, first_position + tl.load(tile + 2)


@triton.jit(do_not_specialize=["table_stride", "held_rows"])
def _attend(
    q,
    out,
    partial,
    states,
    tiles,
    tables,
    keys,
    values,
    key_scales,
    value_scales,
    q_stride,
    table_stride,
    group_size,
    num_kv_heads,
    scale,
    softcap,
    window,
    held_rows,
    IS_SPLIT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write attention into `out`. Each program of a 2D grid (tiles, KV heads) computes all segments of a tile in order.

    With IS_SPLIT (3D grid, third axis: segment), each writes one to `partial` and `states`, which `_reduce` merges.
    """
    kv_head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * 4
    queries, positions, offsets, has_row = _load_queries(q, tile, kv_head, q_stride, group_size, PACKED, SIZE, BLOCK)
    table = tables + tl.load(tile) * table_stride
    first, end = _seen(tile, window, HAS_WINDOW, SEGMENT)
    last = end
    if IS_SPLIT:
        start_of_own = tl.program_id(2) * SEGMENT
        last = tl.where(start_of_own >= first, tl.minimum(start_of_own + SEGMENT, end), 0)
        first = start_of_own
    highest, total, weighted = _empty_softmax(PACKED, BLOCK)
    for start in range(first, last, SEGMENT):
        state = _segment(
            queries, positions, keys, values, key_scales, value_scales, table, kv_head, start, end, num_kv_heads,
            scale, softcap, window, HAS_SCALES, HAS_SOFTCAP, HAS_WINDOW, PACKED, KEYS, SEGMENT, SIZE, BLOCK, TOKENS
        )  # fmt: skip
        highest, total, weighted = _merge(highest, total, weighted, state[0], state[1], state[2])
    if IS_SPLIT:
        if first < last:
            rows = _partial_rows(kv_head, num_kv_heads, tl.program_id(2), tl.num_programs(2), held_rows, PACKED)
            columns = tl.arange(0, BLOCK)
            tl.store(states + 2 * rows, highest, mask=has_row)
            tl.store(states + 2 * rows + 1, total, mask=has_row)
            tl.store(partial + rows[:, None] * BLOCK + columns[None, :], weighted, mask=has_row[:, None])
    else:
        _store(out, offsets, has_row, weighted / total[:, None], SIZE, BLOCK)


@triton.jit(do_not_specialize=["num_segments", "held_rows"])
def _reduce(
    partial,
    states,
    out,
    tiles,
    q_stride,
    group_size,
    num_kv_heads,
    num_segments,
    window,
    held_rows,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the segments of each tile in ascending order, on a grid (tiles, KV heads)."""
    kv_head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * 4
    _, offsets, has_row = _rows(tile, kv_head, q_stride, group_size, PACKED, SIZE)
    first, end = _seen(tile, window, HAS_WINDOW, SEGMENT)
    columns = tl.arange(0, BLOCK)
    highest, total, weighted = _empty_softmax(PACKED, BLOCK)
    for start in range(first, end, SEGMENT):
        rows = _partial_rows(kv_head, num_kv_heads, start // SEGMENT, num_segments, held_rows, PACKED)
        other_highest = tl.load(states + 2 * rows, mask=has_row, other=0.0)
        other_total = tl.load(states + 2 * rows + 1, mask=has_row, other=1.0)
        weighted_rows = partial + rows[:, None] * BLOCK + columns[None, :]
        other_weighted = tl.load(weighted_rows, mask=has_row[:, None], other=0.0)
        highest, total, weighted = _merge(highest, total, weighted, other_highest, other_total, other_weighted)
    _store(out, offsets, has_row, weighted / total[:, None], SIZE, BLOCK)


@dataclass(frozen=True)
class TritonAttentionPlan:
    """The tiles of a batch, which are consecutive rows of one sequence."""

    tiles: Tensor  # int32 [A, 4]: sequence, first row, number of rows, first position
    block_tables: Tensor
    packed_rows: int
    held_rows: int  # packed rows of the largest tile
    num_segments: int  # of the longest tile; 0: one program computes all segments of a tile
    prompts: PromptPlan | None = None  # for torch's attention, if it may compute the batch instead


def plan_attention(
    query_lens: Lengths,
    seq_lens: Lengths,
    block_tables: Tensor,
    group_size: int,
    num_kv_heads: int,
    sizes: AttentionTiles,
    positions: Tensor | None = None,
) -> TritonAttentionPlan:
    """Cut the rows of each sequence into tiles, and choose one of the two grids, which give the same bits.

    If each sequence has one row, `positions` [S] holds their positions, and the tiles are made on the device.
    """
    packed_rows = max(sizes.packed_rows, triton.next_power_of_2(group_size))
    rows_of_tile = packed_rows // group_size
    num_tiles = -(-query_lens // rows_of_tile)
    sequences = np.repeat(np.arange(len(query_lens)), num_tiles)
    number = np.arange(len(sequences)) - np.repeat(num_tiles.cumsum() - num_tiles, num_tiles)
    offsets = number * rows_of_tile
    num_rows = np.minimum(query_lens[sequences] - offsets, rows_of_tile)
    first_positions = (seq_lens - query_lens)[sequences] + offsets
    segments = -(-(first_positions + num_rows) // sizes.segment)
    num_segments = int(segments.max(initial=0))
    # No need to split: one program needs no longer for the longest tile than the device needs for all tiles together.
    if num_segments < 2 or num_segments * TARGET_PROGRAMS <= int(segments.sum()) * num_kv_heads:
        num_segments = 0
    if positions is not None:
        sequence = torch.arange(len(positions), device=positions.device)
        tiles = torch.stack((sequence, sequence, torch.ones_like(sequence), positions), dim=1).to(torch.int32)
    else:
        first_rows = (query_lens.cumsum() - query_lens)[sequences] + offsets
        on_host = np.stack((sequences, first_rows, num_rows, first_positions), axis=1)
        tiles = to_device(on_host, np.int32, block_tables.device)
    held_rows = int(num_rows.max(initial=1)) * group_size
    return TritonAttentionPlan(tiles, block_tables, packed_rows, held_rows, num_segments)


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    plan: TritonAttentionPlan,
    scale: float,
    window: int | None,
    sizes: AttentionTiles,
    softcap: float = 0.0,
) -> Tensor:
    """Return causal attention of q [T, H, D], contiguous, to the keys and values [B, N, KH, D] in each row's blocks.

    int8 keys and values are codes, to be multiplied by scales [B, KH, N]. A row at position p sees positions
    max(0, p - window + 1) .. p. With a softcap, scores become softcap * tanh(score / softcap) (Gemma 2).
    The result is [T, H, D].
    """
    _, num_heads, size = q.shape
    num_kv_heads = cache.keys.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tiles = len(plan.tiles)
    if not num_tiles:
        return out
    assert q.is_contiguous()
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    block = max(16, triton.next_power_of_2(size))
    strides = (q.stride(0), plan.block_tables.stride(0), num_heads // num_kv_heads, num_kv_heads)
    stored = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    inputs = (plan.tiles, plan.block_tables, *stored, *strides, scale, softcap, window or 0, plan.held_rows)
    flags = {"HAS_WINDOW": window is not None, "PACKED": plan.packed_rows, "SIZE": size, "BLOCK": block}
    flags |= {"SEGMENT": sizes.segment}
    attend_flags = flags | {"HAS_SOFTCAP": softcap != 0, "HAS_SCALES": cache.key_scales is not None}
    attend_flags |= {"KEYS": sizes.keys, "TOKENS": cache.keys.shape[1]}
    options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages, **LAUNCH_OPTIONS}
    shape = (num_tiles, num_kv_heads, plan.num_segments, plan.held_rows)
    if not 0 < math.prod(shape) * block * 4 <= MAX_PARTIAL_BYTES:
        _attend[shape[:2]](q, out, None, None, *inputs, IS_SPLIT=False, **attend_flags, **options)
        return out
    partial = torch.empty((*shape, block), dtype=torch.float32, device=q.device)
    states = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    _attend[shape[:3]](q, out, partial, states, *inputs, IS_SPLIT=True, **attend_flags, **options)
    _reduce[shape[:2]](
        partial,
        states,
        out,
        plan.tiles,
        q.stride(0),
        num_heads // num_kv_heads,
        num_kv_heads,
        plan.num_segments,
        window or 0,
        plan.held_rows,
        **flags,
        num_warps=sizes.num_warps,
        **LAUNCH_OPTIONS,
    )
    return out
