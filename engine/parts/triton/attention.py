"""Flash attention (Dao et al. 2022) over a paged KV cache.

The query heads that share a KV head (grouped-query attention) are rows of one product, or of several if they are too
many for one. These rows, pairs of token and query head, are called packed rows. Keys are cut into segments of fixed
length aligned to position 0. Each segment gets a running softmax of its own, and segments are merged in ascending
order. A fixed number of programs walks a work list (`attention_plan`). The program that computes the first segments of
a tile merges them at once; other segments wait for a second kernel, which continues in the same order with the same
function. So a row gets the same bits however its tile is split, and prompts and decoding use the same kernel with the
same tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import AttentionKind
from engine.kernels.interface import AttentionScores, LayerCache
from engine.parts.triton.attention_plan import (
    END_ITEM,
    END_SEGMENT,
    FIRST_ITEM,
    FIRST_POSITION,
    FIRST_ROW,
    FIRST_SEGMENT,
    MERGED_PARTIAL_ROW,
    MERGED_ROW,
    NUM_FIELDS,
    NUM_MERGED_ROWS,
    NUM_PARTIALS,
    NUM_ROWS,
    PARTIAL_ROW,
    SEQUENCE,
    head_columns,
)
from engine.parts.triton.float8 import float8_numbers
from engine.parts.triton.prompt_attention import PromptPlan
from engine.parts.triton.tiles import LAUNCH_OPTIONS, AttentionTiles

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(100.0)  # 2^100 is finite, and large enough to stand for infinity here
FIELDS = tl.constexpr(NUM_FIELDS)
MERGED_COLUMNS = 32  # of a program of `_reduce`: more programs than split tiles, which are few
MERGED_AHEAD = tl.constexpr(4)  # partial results under way


@triton.jit
def _empty_softmax(PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Return a running softmax that has seen no key. Merging it with another gives the other's bits."""
    highest = tl.full((PACKED,), float("-inf"), tl.float32)
    return highest, tl.zeros((PACKED,), tl.float32), tl.zeros((PACKED, BLOCK), tl.float32)


@triton.jit
def _field(row, column: tl.constexpr):
    """Return a field of a row of the work list, by its column."""
    return tl.load(row + column).to(tl.int32)


@triton.jit
def _rows(num_rows, group_size, part_size, PACKED: tl.constexpr):
    """Return for each packed row its token's index in the tile, its query head, and whether it exists.

    The second number of a program is that of a KV head and of a part of the query heads that share it.
    """
    packed = tl.arange(0, PACKED)
    num_parts = tl.cdiv(group_size, part_size)
    rows, heads = packed // part_size, tl.program_id(1) % num_parts * part_size + packed % part_size
    exists = (rows < num_rows) & (heads < group_size)
    return rows, tl.program_id(1) // num_parts * group_size + heads, exists


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
def _partial_rows(first, PACKED: tl.constexpr):
    """Return the rows of `partial` and `states` that hold a partial result, of which `first` is the first."""
    return (first + tl.arange(0, PACKED)).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _result(highest, total, weighted, sinks, heads, has_row):
    """Return the weighted means of a running softmax, in which the sinks of the heads take part, if there are any."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=has_row, other=float("-inf")) * LOG2_E
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.exp2(sink - new_highest)
        weighted = weighted * shrink[:, None]
    return weighted / total[:, None]


@triton.jit
def _load_numbers(stored, offsets, mask, dtype: tl.constexpr):
    """Load keys or values as numbers of `dtype`, exact if they are int8, float8 or its bits. Scales come later."""
    codes = tl.load(stored + offsets, mask=mask, other=0.0)
    return (float8_numbers(codes) if codes.dtype == tl.uint8 else codes).to(dtype)


@triton.jit
def _scaled(scores, scale, softcap):
    """Return scores times `scale`, capped if there is a soft cap, times log2(e)."""
    if softcap is not None:
        return _capped(scores * scale, softcap) * LOG2_E
    return scores * (scale * LOG2_E)


@triton.jit
def _capped(scores, softcap):
    # tanh(x) = 1 - 2 / (e^2x + 1)
    bounded = tl.minimum(scores * (2.0 * LOG2_E / softcap), LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return softcap * (1.0 - 2.0 / (tl.exp2(bounded) + 1.0))


@triton.jit
def _is_visible(tokens, positions, window):
    """Return whether rows at `positions` see tokens."""
    visible = tokens[None, :] <= positions[:, None]
    if window is not None:
        visible &= tokens[None, :] > positions[:, None] - window
    return visible


@triton.jit
def _load_values(values, scales, offsets, scale_offsets, mask, has_token, dtype: tl.constexpr):
    numbers = _load_numbers(values, offsets, mask, dtype)
    if scales is not None:  # scales the values: small weights would be lost in float16
        factors = tl.load(scales + scale_offsets, mask=has_token, other=0.0)
        numbers = (numbers.to(tl.float32) * factors[:, None]).to(dtype)
    return numbers


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
    oldest,
    end,
    num_kv_heads,
    block_stride,
    scale_stride,
    scale,
    softcap,
    window,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return the running softmax of packed rows q [PACKED, BLOCK] over the keys start .. end of one segment.

    Scores are multiplied by log2(e). `oldest` is the first position in the window of the tile's first row, which may be
    negative, `end` the one after its last row. Nothing else is read: it may be NaN, which weights of 0 would spread.
    """
    columns = tl.arange(0, BLOCK)
    highest, total, weighted = _empty_softmax(PACKED, BLOCK)
    first = tl.maximum(start, oldest // KEYS * KEYS) if window is not None else start
    for offset in range(first, tl.minimum(start + SEGMENT, end), KEYS):
        tokens = offset + tl.arange(0, KEYS)
        has_token = (tokens >= oldest) & (tokens < end) if window is not None else tokens < end
        blocks = tl.load(table + tokens // TOKENS, mask=has_token, other=0).to(tl.int64)
        offsets = blocks * block_stride + (tokens % TOKENS * num_kv_heads + kv_head) * SIZE
        scale_offsets = blocks * scale_stride + kv_head * TOKENS + tokens % TOKENS
        offsets = offsets[:, None] + columns[None, :]
        mask = has_token[:, None] & (columns < SIZE)[None, :]
        k = _load_numbers(keys, offsets, mask, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if key_scales is not None:
            scores *= tl.load(key_scales + scale_offsets, mask=has_token, other=0.0)[None, :]
        scores = _scaled(scores, scale, softcap)
        scores = tl.where(_is_visible(tokens, positions, window), scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - pivot)
        weights = tl.exp2(scores - pivot[:, None])
        v = _load_values(values, value_scales, offsets, scale_offsets, mask, has_token, q.dtype)
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        highest = new_highest
    return highest, total, weighted


@triton.jit
def _load_queries(q, offsets, has_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = has_row[:, None] & (columns < SIZE)[None, :]
    return tl.load(q + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_partial(
    partial, states, first, has_row, highest, total, weighted, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Store a running softmax in rows of `partial` and `states`."""
    rows = _partial_rows(first, PACKED)
    columns = tl.arange(0, BLOCK)
    tl.store(states + 2 * rows, highest, mask=has_row)
    tl.store(states + 2 * rows + 1, total, mask=has_row)
    tl.store(partial + rows[:, None] * BLOCK + columns[None, :], weighted, mask=has_row[:, None])


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q,
    partial,
    states,
    work,
    tables,
    keys,
    values,
    key_scales,
    value_scales,
    sinks,
    q_stride,
    table_stride,
    block_stride,
    scale_stride,
    group_size,
    part_size,
    num_kv_heads,
    scale,
    softcap,
    window,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Compute the items of each program of a grid (programs, parts of the query heads that share a KV head).

    Results of whole tiles replace their queries. Others go into `partial` and `states`, and `_reduce` merges them.
    """
    program, kv_head = work + tl.program_id(0) * FIELDS, tl.program_id(1) // tl.cdiv(group_size, part_size)
    for number in range(_field(program, FIRST_ITEM), _field(program, END_ITEM)):
        item = work + number * FIELDS
        num_rows, first_position = _field(item, NUM_ROWS), _field(item, FIRST_POSITION)
        rows, heads, has_row = _rows(num_rows, group_size, part_size, PACKED)
        offsets = (_field(item, FIRST_ROW) + rows).to(tl.int64) * q_stride + heads * SIZE
        positions = tl.where(has_row, first_position + rows, first_position)  # rows that do not exist see a key too
        queries = _load_queries(q, offsets, has_row, SIZE, BLOCK)
        table = tables + _field(item, SEQUENCE).to(tl.int64) * table_stride
        oldest = 0 if window is None else first_position - window + 1
        end = first_position + num_rows
        highest, total, weighted = _empty_softmax(PACKED, BLOCK)
        for segment in range(_field(item, FIRST_SEGMENT), _field(item, END_SEGMENT)):
            state = _segment(
                queries, positions, keys, values, key_scales, value_scales, table, kv_head, segment * SEGMENT, oldest,
                end, num_kv_heads, block_stride, scale_stride, scale, softcap, window, PACKED, KEYS, SEGMENT,
                SIZE, BLOCK, TOKENS
            )  # fmt: skip
            highest, total, weighted = _merge(highest, total, weighted, state[0], state[1], state[2])
        if _field(item, PARTIAL_ROW) < 0:
            _store(q, offsets, has_row, _result(highest, total, weighted, sinks, heads, has_row), SIZE, BLOCK)
        else:
            _store_partial(partial, states, _field(item, PARTIAL_ROW), has_row, highest, total, weighted, PACKED, BLOCK)


@triton.jit
def _reduce(
    partial,
    states,
    q,
    work,
    sinks,
    q_stride,
    group_size,
    part_size,
    PACKED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge the partial results of each split tile in ascending order, and replace its queries.

    Programs have a tile (or none), a part of the query heads that share a KV head, and COLUMNS of BLOCK columns each.
    """
    program = work + tl.program_id(0) * FIELDS
    num_partials = _field(program, NUM_PARTIALS)
    if num_partials > 0:
        num_rows, partial_row = _field(program, NUM_MERGED_ROWS), _field(program, MERGED_PARTIAL_ROW).to(tl.int64)
        tokens, heads, has_row = _rows(num_rows, group_size, part_size, PACKED)
        offsets = (_field(program, MERGED_ROW) + tokens).to(tl.int64) * q_stride + heads * SIZE
        columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        highest, total, weighted = _empty_softmax(PACKED, COLUMNS)
        for _ in tl.range(0, num_partials, num_stages=MERGED_AHEAD):
            rows = _partial_rows(partial_row, PACKED)
            its_highest = tl.load(states + 2 * rows, mask=has_row, other=0.0)
            its_total = tl.load(states + 2 * rows + 1, mask=has_row, other=1.0)
            its_rows = partial + rows[:, None] * BLOCK + columns[None, :]
            its_weighted = tl.load(its_rows, mask=has_row[:, None], other=0.0)
            highest, total, weighted = _merge(highest, total, weighted, its_highest, its_total, its_weighted)
            partial_row += num_rows * part_size
        mask = has_row[:, None] & (columns < SIZE)[None, :]
        result = _result(highest, total, weighted, sinks, heads, has_row)
        tl.store(q + offsets[:, None] + columns[None, :], result.to(q.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class TritonAttentionPlan:
    """What is to be computed, on the device."""

    work: Tensor  # int64 [.., NUM_FIELDS]: the table of a WorkList
    num_programs: int  # for each part of the query heads
    num_partial_rows: int
    part_size: int  # query heads of a program
    kind: AttentionKind
    prompts: PromptPlan | None = None  # the other sequences, for torch's flash attention


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    plan: TritonAttentionPlan,
    block_tables: Tensor,
    scores: AttentionScores,
    sizes: AttentionTiles,
) -> Tensor:
    """Return causal attention of q [T, H, D], contiguous, to the keys and values [B, N, KH, D] in each row's blocks.

    Keys and values of 8 bits are codes, to be multiplied by scales [B, KH, N].
    The result takes the place of q; rows that are not in the plan, which fill a CUDA graph up, stay as they are.
    """
    _, num_heads, size = q.shape
    _, block_size, num_kv_heads, _ = cache.keys.shape
    group_size = num_heads // num_kv_heads
    num_parts = num_kv_heads * triton.cdiv(group_size, plan.part_size)
    assert q.is_contiguous()
    assert cache.keys.stride() == cache.values.stride()
    assert cache.keys.stride()[1:] == (num_kv_heads * size, size, 1)
    block = head_columns(size)
    partial = torch.empty((plan.num_partial_rows, num_parts, block), dtype=torch.float32, device=q.device)
    states = torch.empty((plan.num_partial_rows, num_parts, 2), dtype=torch.float32, device=q.device)
    flags = {"PACKED": sizes.packed_rows, "SIZE": size, "BLOCK": block}
    steps = {"KEYS": sizes.keys, "SEGMENT": sizes.segment, "TOKENS": block_size}
    options = {"num_warps": sizes.num_warps, **LAUNCH_OPTIONS}
    _attend[plan.num_programs, num_parts](
        q,
        partial,
        states,
        plan.work,
        block_tables,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        scores.sinks,
        q.stride(0),
        block_tables.stride(0),
        cache.keys.stride(0),
        0 if cache.key_scales is None else cache.key_scales.stride(0),
        group_size,
        plan.part_size,
        num_kv_heads,
        scores.scale,
        scores.softcap,
        plan.kind.window,
        **steps,
        num_stages=sizes.num_stages,
        **flags,
        **options,
    )
    if plan.num_partial_rows:
        columns = min(block, MERGED_COLUMNS)
        inputs = (partial, states, q, plan.work, scores.sinks, q.stride(0), group_size, plan.part_size)
        _reduce[plan.num_programs, num_parts, block // columns](*inputs, COLUMNS=columns, **flags, **options)
    return q
