"""The work list of attention: which program computes which rows and keys. It is made on the host, once a step.

The rows of a sequence are cut into tiles, and the keys that a tile sees into segments of fixed length, each of which
takes about the same time. All segments, tile after tile, are divided evenly among a fixed number of programs (as in
Stream-K, Osama et al. 2023). What a program computes of one tile is an item. Most items are a whole tile, whose result
is complete; only the tiles at the borders between programs are split, and merged afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import triton.language as tl
from numpy.typing import NDArray

from engine.batch.inputs import Lengths, WorkList
from engine.config import AttentionKind
from engine.parts.triton.tiles import AttentionTiles

NUM_FIELDS = 7  # columns of the table
# The columns of a program: its items are the rows FIRST_ITEM .. END_ITEM - 1; the others are of the tile it merges.
FIRST_ITEM = tl.constexpr(0)
END_ITEM = tl.constexpr(1)
MERGED_ROW = tl.constexpr(2)  # first row of the batch
NUM_MERGED_ROWS = tl.constexpr(3)
NUM_PARTIALS = tl.constexpr(4)  # 0: it merges none
MERGED_PARTIAL_ROW = tl.constexpr(5)  # first row of the first partial result
# The columns of an item.
SEQUENCE = tl.constexpr(0)
FIRST_ROW = tl.constexpr(1)  # of the batch
NUM_ROWS = tl.constexpr(2)
FIRST_POSITION = tl.constexpr(3)  # of the first row
FIRST_SEGMENT = tl.constexpr(4)
END_SEGMENT = tl.constexpr(5)  # the one after the last
PARTIAL_ROW = tl.constexpr(6)  # first row of its partial result; -1: it is a whole tile
MAX_PARTIAL_BYTES = 128 * 2**20  # of results that wait to be merged
# Merging costs time, so a tile is not split if it has at most this part of the segments of a program.
SMALL_PART = 1 / 8


@dataclass(frozen=True)
class QueryTiles:
    """Consecutive rows of one sequence, in arrays [A]. The segments of all tiles are numbered in one sequence."""

    sequences: Lengths
    first_rows: Lengths
    num_rows: Lengths
    first_positions: Lengths  # tokens
    first_segments: Lengths  # of the sequence
    starts: Lengths  # number of the first segment, and
    ends: Lengths  # of the one after the last

    @property
    def total(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


@dataclass(frozen=True)
class TritonAttentionPlanner:
    """Makes the work lists of a kind of attention on a card."""

    tile_tokens: int
    part_size: int  # query heads of a program: all that share a KV head, or a part of them if they are too many
    segment: int  # tokens
    num_programs: int  # for each part
    max_partial_rows: int  # packed rows of results that wait to be merged
    window: int | None

    def plan(self, query_lens: Lengths, seq_lens: Lengths) -> WorkList:
        """Return the work list of the last `query_lens` rows of each sequence.

        The table [num_programs + I, NUM_FIELDS] begins with a row for each program. I items follow. The first item of
        a split tile has all segments up to a border, the others have one each.
        """
        tiles = self._tiles(query_lens, seq_lens)
        borders = np.concatenate(([0], self._borders(tiles), [tiles.total]))
        starts = np.union1d(tiles.starts, _split_segments(tiles, borders))
        ends = np.append(starts[1:], tiles.total)[: len(starts)]
        tile = np.searchsorted(tiles.ends, starts, side="right")
        is_first = starts == tiles.starts[tile]
        is_split = (ends - starts) < (tiles.ends - tiles.starts)[tile]
        partial_rows = tiles.num_rows[tile] * self.part_size * is_split
        partial_ends = partial_rows.cumsum()
        skipped = tiles.first_segments[tile] - tiles.starts[tile]
        table = np.zeros((self.num_programs + len(starts), NUM_FIELDS), dtype=np.int64)
        programs, items = table[: self.num_programs], table[self.num_programs :]
        item_rows = np.searchsorted(starts, borders) + self.num_programs
        programs[:, FIRST_ITEM], programs[:, END_ITEM] = item_rows[:-1], item_rows[1:]
        items[:, SEQUENCE], items[:, FIRST_ROW] = tiles.sequences[tile], tiles.first_rows[tile]
        items[:, NUM_ROWS], items[:, FIRST_POSITION] = tiles.num_rows[tile], tiles.first_positions[tile]
        items[:, FIRST_SEGMENT], items[:, END_SEGMENT] = starts + skipped, ends + skipped
        items[:, PARTIAL_ROW] = np.where(is_split, partial_ends - partial_rows, -1)
        (firsts,) = (is_first & is_split).nonzero()
        if len(firsts):
            merging, merged = programs[: len(firsts)], items[firsts]
            merging[:, MERGED_ROW], merging[:, NUM_MERGED_ROWS] = merged[:, FIRST_ROW], merged[:, NUM_ROWS]
            merging[:, NUM_PARTIALS] = np.add.reduceat(is_split, firsts, dtype=np.int64)
            merging[:, MERGED_PARTIAL_ROW] = merged[:, PARTIAL_ROW]
        return WorkList(table, int(partial_ends[-1]) if len(starts) else 0)

    def largest(self, num_seqs: int, max_model_len: int) -> WorkList:
        """Return an empty work list that has room for any step in which each of `num_seqs` sequences has one row."""
        num_partials = min(num_seqs, self.num_programs - 1) * -(-max_model_len // self.segment)
        num_partials = min(num_partials, self.max_partial_rows // self.part_size)
        table = np.zeros((self.num_programs + num_seqs + num_partials, NUM_FIELDS), dtype=np.int64)
        return WorkList(table, num_partials * self.part_size)

    def _tiles(self, query_lens: Lengths, seq_lens: Lengths) -> QueryTiles:
        num_tiles = -(-query_lens // self.tile_tokens)
        sequences = np.repeat(np.arange(len(query_lens)), num_tiles)
        offsets = (np.arange(len(sequences)) - (num_tiles.cumsum() - num_tiles)[sequences]) * self.tile_tokens
        num_rows = np.minimum(query_lens[sequences] - offsets, self.tile_tokens)
        first_rows = (query_lens.cumsum() - query_lens)[sequences] + offsets
        first_positions = (seq_lens - query_lens)[sequences] + offsets
        first_segments = np.zeros_like(first_positions)
        if self.window is not None:
            first_segments = np.maximum(first_positions - self.window + 1, 0) // self.segment
        num_segments = -(-(first_positions + num_rows) // self.segment) - first_segments
        ends = num_segments.cumsum()
        return QueryTiles(sequences, first_rows, num_rows, first_positions, first_segments, ends - num_segments, ends)

    def _borders(self, tiles: QueryTiles) -> NDArray[np.int64]:
        """Return the first segment of each program but the first, in ascending order.

        A border that would split a small tile, or one for which there is no room, moves to the nearer end of the tile.
        """
        borders = np.arange(1, self.num_programs) * tiles.total // self.num_programs
        if not tiles.total:
            return borders
        tile = np.searchsorted(tiles.ends, borders, side="right")
        starts, ends = tiles.starts[tile], tiles.ends[tile]
        is_large = ends - starts > SMALL_PART * tiles.total / self.num_programs
        splits = is_large & (borders > starts)
        splits &= np.isin(tile, self._splittable(tiles, tile[splits], borders[splits]))
        return np.where(splits, borders, np.where(borders - starts < ends - borders, starts, ends))

    def _splittable(self, tiles: QueryTiles, tile: Lengths, borders: Lengths) -> Lengths:
        """Return the tiles that may be split at borders: short and long ones, as many as there is room for.

        Tiles of few rows come first, since their results take the least room, and among them those of most segments.
        """
        tile, first = np.unique(tile, return_index=True)
        rows = tiles.num_rows[tile] * self.part_size
        partial_rows = (tiles.ends[tile] - borders[first] + 1) * rows
        order = np.lexsort((tiles.starts[tile] - tiles.ends[tile], rows))
        return tile[order][partial_rows[order].cumsum() <= self.max_partial_rows]


def _split_segments(tiles: QueryTiles, borders: Lengths) -> Lengths:
    """Return the segments of split tiles from the first border in each tile on."""
    borders = borders[borders < tiles.total]
    tile = np.searchsorted(tiles.ends, borders, side="right")
    borders, tile = borders[borders > tiles.starts[tile]], tile[borders > tiles.starts[tile]]
    tile, first = np.unique(tile, return_index=True)
    lens = tiles.ends[tile] - borders[first]
    segments: Lengths = np.arange(lens.sum()) + np.repeat(tiles.ends[tile] - lens.cumsum(), lens)
    return segments


def new_planner(sizes: AttentionTiles, kind: AttentionKind, num_programs: int) -> TritonAttentionPlanner:
    """Return the planner of a kind of attention, for a card that runs `num_programs` at a time."""
    group_size = kind.num_heads // kind.num_kv_heads
    part_size = -(-group_size // -(-group_size // sizes.packed_rows))
    num_parts = kind.num_kv_heads * -(-group_size // part_size)
    return TritonAttentionPlanner(
        tile_tokens=sizes.packed_rows // part_size,
        part_size=part_size,
        segment=sizes.segment,
        num_programs=max(1, num_programs // num_parts),
        max_partial_rows=MAX_PARTIAL_BYTES // (4 * num_parts * head_columns(kind.head_dim)),
        window=kind.window,
    )


def head_columns(head_dim: int) -> int:
    """Return the columns of a tile for a head size: a power of two, because that is all that tiles can have."""
    return max(16, 1 << (head_dim - 1).bit_length())
