"""Flash attention (Dao et al. 2022) over a paged KV cache, in plain torch.

Keys are cut into tiles of fixed length aligned to position 0, visited in ascending order, and merged with the running
softmax. A tile that a row does not see leaves the row's state unchanged to the bit, so the order of additions does not
depend on the lengths of other sequences, on the size of a prompt's chunks, or on what was cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch.inputs import Lengths
from engine.config import AttentionKind, KVShape
from engine.kernels.interface import AttentionScores, LayerCache, check_attention
from engine.kernels.lazy_memory import lazy_zeros
from engine.kernels.torch.linear import random_numbers

KEY_TILE = 256  # keys that one step of the running softmax takes in
QUERY_TILES = (1, 16, 128)  # tokens of one sequence that are computed together: the smallest size that holds them all
ROW_MULTIPLE = 8  # the packed rows of a query tile are padded to a multiple of this
PROBE_TILES = (1, 2, 3, 16)  # numbers of products in one call to try


@dataclass(slots=True)
class QueryTile:
    """Consecutive rows of one sequence."""

    sequence: int
    first_row: int
    num_rows: int
    first_position: int


@dataclass(slots=True)
class QueryGroup:
    """Query tiles of one size Q, A in number, in descending order of their keys: those that have some left come first.

    A packed row is a pair of token and query head; a tile has R = Q * G of them for each KV head, padded.
    """

    rows: Tensor  # [A, Q] rows of the batch, padded with T
    positions: Tensor  # [A, 1, R, 1] position of each packed row, -1 for padding
    sequences: Tensor  # [A] sequence of each query tile
    num_active: list[int]  # for each key tile: number of query tiles that see some of it
    first_positions: list[int]  # of each query tile
    starts: Tensor  # [A, 1, 1, 1] the position of the first row of each query tile
    ends: Tensor  # [A, 1, 1, 1] the position after the last row of each query tile


@dataclass(slots=True)
class TorchAttentionPlan:
    """The query tiles of a batch, grouped by size."""

    groups: list[QueryGroup]
    kind: AttentionKind


def numbers_per_token(groups: Sequence[Sequence[KVShape]]) -> int:
    """Return how many numbers of keys and values a block holds for each of its tokens: those of the largest group."""
    return max(2 * sum(shape.size for shape in group) for group in groups)


def new_kv_cache(
    groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[list[LayerCache]]:
    """Return empty keys and values [B, N, KH, D] of each layer, those of a group one after the other in each block."""
    memory = lazy_zeros((num_blocks, block_size * numbers_per_token(groups)), dtype, device)

    def layers(group: Sequence[KVShape]) -> Iterator[LayerCache]:
        start = 0
        for shape in group:
            size, tokens = block_size * shape.size, (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
            keys, values = memory[:, start : start + size], memory[:, start + size : start + 2 * size]
            yield LayerCache(shape, keys.view(tokens), values.view(tokens))
            start += 2 * size

    return [list(layers(group)) for group in groups]


def cached_keys(cache: LayerCache, block_ids: Tensor) -> Tensor:
    """Return the keys in blocks `block_ids` [B'] as float32 [B' * N, KH, D], one block after the other."""
    keys = cache.keys[block_ids].float()
    if cache.key_scales is not None:
        keys *= cache.key_scales[block_ids].transpose(1, 2)[..., None]
    return keys.flatten(0, 1)


def plan_attention(
    query_lens: Lengths, seq_lens: Lengths, kind: AttentionKind, tile_sizes: tuple[int, ...], device: torch.device
) -> TorchAttentionPlan:
    """Cut the last `query_lens` rows of each sequence into query tiles of the given sizes."""
    members: dict[int, list[QueryTile]] = {}
    first_row = 0
    for index, (query_len, seq_len) in enumerate(zip(query_lens.tolist(), seq_lens.tolist(), strict=True)):
        size = next((tile for tile in tile_sizes if tile >= query_len), tile_sizes[-1])
        for offset in range(0, query_len, size):
            num_rows = min(size, query_len - offset)
            position = seq_len - query_len + offset
            members.setdefault(size, []).append(QueryTile(index, first_row + offset, num_rows, position))
        first_row += query_len
    group_size = kind.num_heads // kind.num_kv_heads
    groups = [_group(size, group, group_size, first_row, device) for size, group in members.items()]
    return TorchAttentionPlan(groups, kind)


def paged_attention(
    q: Tensor, cache: LayerCache, plan: TorchAttentionPlan, block_tables: Tensor, scores: AttentionScores
) -> Tensor:
    """Return causal attention of q [T, H, D] to the keys and values in each row's blocks: [T, H, D]."""
    check_attention(q, cache, plan.kind, scores)
    num_rows, num_heads, head_dim = q.shape
    padded = q.new_zeros((num_rows + 1, num_heads, head_dim))  # the last row stands for padding
    padded[:num_rows] = q
    out = torch.empty_like(padded)
    tables = _pad_tables(block_tables, KEY_TILE // cache.keys.shape[1])
    for group in plan.groups:
        out[group.rows] = _attend(padded[group.rows], cache, group, tables[group.sequences], scores, plan.kind.window)
    return out[:num_rows]


def products_agree(
    group_size: int, head_dim: int, tile_sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether the products of `_attend`, q k^T and p v, are independent of the number of rows and of tiles."""
    rows = [_round_up(tile * group_size, ROW_MULTIPLE) for tile in tile_sizes]
    keys = random_numbers(PROBE_TILES[-1], KEY_TILE, head_dim, device=device, dtype=dtype).float()
    for w in (keys.transpose(1, 2), keys):
        x = random_numbers(len(w), rows[-1], w.shape[1], device=device, dtype=dtype).float()
        expected = torch.bmm(x, w)
        for num in rows:
            some = x[:, :num].contiguous()
            if not all(torch.equal(torch.bmm(some[:n], w[:n]), expected[:n, :num]) for n in PROBE_TILES):
                return False
    return True


def _group(size: int, tiles: list[QueryTile], group_size: int, padding_row: int, device: torch.device) -> QueryGroup:
    """Return tiles of up to `size` tokens as a group, padded. `group_size`: query heads that share a KV head."""
    tiles.sort(key=lambda tile: -(tile.first_position + tile.num_rows))
    offsets = torch.arange(size)
    valid = offsets < torch.tensor([tile.num_rows for tile in tiles])[:, None]
    rows = torch.tensor([tile.first_row for tile in tiles])[:, None] + offsets
    positions = torch.tensor([tile.first_position for tile in tiles])[:, None] + offsets
    packed = torch.where(valid, positions, -1).repeat_interleave(group_size, dim=1)
    packed = F.pad(packed, (0, _round_up(packed.shape[1], ROW_MULTIPLE) - packed.shape[1]), value=-1)
    ends = [tile.first_position + tile.num_rows for tile in tiles]
    return QueryGroup(
        rows=torch.where(valid, rows, padding_row).to(device),
        positions=packed[:, None, :, None].to(device),
        sequences=torch.tensor([tile.sequence for tile in tiles], device=device),
        num_active=[sum(end > start for end in ends) for start in range(0, ends[0], KEY_TILE)],
        first_positions=[tile.first_position for tile in tiles],
        starts=torch.tensor([tile.first_position for tile in tiles], device=device)[:, None, None, None],
        ends=torch.tensor(ends, device=device)[:, None, None, None],
    )


def _attend(
    q: Tensor, cache: LayerCache, group: QueryGroup, tables: Tensor, scores: AttentionScores, window: int | None
) -> Tensor:
    """Return flash attention of query tiles q [A, Q, H, D] over the keys and values of their sequences."""
    num_tiles, size, num_heads, head_dim = q.shape
    block_size, num_kv_heads = cache.keys.shape[1:3]
    blocks_per_tile = KEY_TILE // block_size
    num_rows = group.positions.shape[2]
    num_packed = size * num_heads // num_kv_heads
    # Query heads that share a KV head become rows of one product.
    packed = q.new_zeros((num_tiles, num_kv_heads, num_rows, head_dim), dtype=torch.float32)
    heads = q.view(num_tiles, size, num_kv_heads, -1, head_dim).permute(0, 2, 1, 3, 4)
    packed[:, :, :num_packed] = heads.reshape(num_tiles, num_kv_heads, num_packed, head_dim)
    packed *= scores.scale  # 1 / sqrt(D) in most models
    # The running softmax of each packed row: its largest score, the sum of its weights, the weighted sum of values.
    highest = packed.new_full((num_tiles, num_kv_heads, num_rows, 1), float("-inf"))
    total = torch.zeros_like(highest)
    weighted = torch.zeros_like(packed)
    key_positions = torch.arange(KEY_TILE, device=q.device)
    for tile, active in enumerate(group.num_active):
        start = tile * KEY_TILE
        first_visible = 0 if window is None else min(group.first_positions[:active]) - window + 1
        if first_visible >= start + KEY_TILE:
            continue  # no row sees this tile
        blocks = tables[:active, tile * blocks_per_tile : (tile + 1) * blocks_per_tile]
        keys, values = _gather(cache.keys, blocks), _gather(cache.values, blocks)
        # A value that no row sees has weight 0, but 0 * NaN would still spread a NaN that another request left there.
        positions = start + key_positions
        unseen = positions[:, None] >= group.ends[:active]
        if window is not None:
            unseen = unseen | (positions[:, None] < group.starts[:active] - window + 1)
        values.masked_fill_(unseen, 0.0)
        distance = group.positions[:active] - positions  # [A, 1, R, KEY_TILE]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)  # the causal mask
        products = _bmm(packed[:active], keys.transpose(2, 3))  # q k^T, scaled
        if scores.softcap is not None:
            products = products.div_(scores.softcap).tanh_().mul_(scores.softcap)
        products.masked_fill_(hidden, float("-inf"))
        _merge(products, values, highest[:active], total[:active], weighted[:active])
    if scores.sinks is not None:
        sinks = scores.sinks.float().view(num_kv_heads, 1, -1).expand(-1, size, -1).reshape(1, num_kv_heads, -1, 1)
        _add_sinks(F.pad(sinks, (0, 0, 0, num_rows - num_packed)), highest, total, weighted)
    out = (weighted / total)[:, :, :num_packed].view(num_tiles, num_kv_heads, size, -1, head_dim)
    return out.permute(0, 2, 1, 3, 4).reshape(q.shape).to(q.dtype)


def _add_sinks(sinks: Tensor, highest: Tensor, total: Tensor, weighted: Tensor) -> None:
    """Let scores [1, KH, R, 1] without values take part in the softmax, in place."""
    new_highest = torch.maximum(highest, sinks)
    shrink = (highest - new_highest).exp_()
    total.mul_(shrink).add_((sinks - new_highest).exp_())
    weighted.mul_(shrink)


def _merge(scores: Tensor, values: Tensor, highest: Tensor, total: Tensor, weighted: Tensor) -> None:
    """Merge one tile into the running softmax, in place. A row that sees nothing of the tile keeps its bits."""
    new_highest = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
    pivot = new_highest.clamp(min=torch.finfo(torch.float32).min)  # -inf minus -inf would be NaN
    weights = scores.sub_(pivot).exp_()
    shrink = (highest - pivot).exp_()
    total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
    weighted.mul_(shrink).add_(_bmm(weights, values))
    highest.copy_(new_highest)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Return blocks [A, n] of a cache [B, N, KH, D] in float32: [A, KH, n * N, D]."""
    num_tiles, num_blocks = blocks.shape
    _, block_size, num_kv_heads, head_dim = cache.shape
    gathered = cache.index_select(0, blocks.flatten())
    gathered = gathered.view(num_tiles, num_blocks * block_size, num_kv_heads, head_dim).transpose(1, 2)
    return gathered.to(torch.float32, memory_format=torch.contiguous_format)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:3], b.shape[3])


def _pad_tables(tables: Tensor, multiple: int) -> Tensor:
    return F.pad(tables, (0, _round_up(tables.shape[1], multiple) - tables.shape[1]))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
