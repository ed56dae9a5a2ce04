"""Tile sizes of the kernels, for each kind of card.

Tile sizes determine the order of additions, and with it the bits of an answer. So they never depend on a batch, and are
never tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

# By default, the compiler may fuse a product with the sum after it, and so round once instead of twice. Its choice may
# differ between two kernels that must agree to the bit.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


MIN_SIDE = 64  # of a tile; with more rows than a smaller tile has rows and columns, it reads too much too often
EXPERTS_OF_ROW = 4  # about as many as in most models
MAX_SMALL_HEAD = 128
MAX_LARGE_HEAD = 256
MAX_WIDE_HEAD = 512  # beyond, all of the shared memory is needed for one step
MIN_SPLIT_INPUTS = 1024  # with fewer, a program ends before enough of its loads are in flight
MAX_SPLIT_SUMS = 64  # of a thread, where a program adds up several splits: it holds two sums for each number


@dataclass(frozen=True)
class LinearTile:
    """Rows and columns of a program of the product x W^T, its warps, and the stages of its pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def sums_per_thread(self) -> int:
        return self.rows * self.columns // (32 * self.num_warps)


@dataclass(frozen=True)
class LinearTiles:
    """The tiles of a product with weights of one shape: by the number of rows, in ascending order.

    What adds up a number must be the same in all of them: inputs of a step, splits, and the tensor core's instruction
    but for its size in rows and columns. On NVIDIA's 9.0 and 10.0, tiles of fewer than 64 rows or 4 warps have another.
    Each split is added up by itself, and then the splits in order, whether one program computes all splits or one each.
    """

    inputs: int  # of a step
    programs: int  # that fill the card
    tiles: tuple[tuple[int, LinearTile], ...]  # with the first number of rows that each is for
    splits: int = 1

    def tile_for(self, num_rows: int) -> LinearTile:
        return next(tile for first, tile in reversed(self.tiles) if num_rows >= first)

    def first_rows(self, num_outputs: int) -> set[int]:
        """Return the numbers of rows from which on another variant of the kernel computes the product."""
        found = {first for first, _ in self.tiles}
        if self.splits > 1:  # once there are enough tiles, a program computes all splits
            row_tiles = [_ceil(self.programs, _ceil(num_outputs, tile.columns)) for _, tile in self.tiles]
            found |= {(num - 1) * tile.rows + 1 for num, (_, tile) in zip(row_tiles, self.tiles, strict=True)}
        return found


@dataclass(frozen=True)
class LinearTable:
    """The tiles of products on one kind of card, from the smallest."""

    inputs: int
    programs: int
    tiles: tuple[LinearTile, ...]

    def tiles_for(self, num_outputs: int, num_inputs: int) -> LinearTiles:
        """Return the tiles for weights of a shape.

        A larger tile reads x and the weights less often, and is used as soon as there are enough of them to fill the
        card. One narrower than 64 is left as soon as there are more rows than it has rows or columns: it would read the
        weights twice, or more bytes of x than of the weights. Only weights that even the narrowest tiles leave with too
        few programs are split: splits cost a second kernel that reads their sums.

        With few rows, the time is that of reading the weights, and a program has (stages - 1) x columns x inputs of
        them in flight. An H100's memory has a latency of about 0.7 us and moves 3.35 TB/s, so about 2.3 MB must be in
        flight. In Llama-3-8B with bfloat16, 4096 x 4096 and 4096 x 14336 have 128 tiles of 32 columns with 28 KiB each,
        6144 x 4096 has 96 of 64 columns with 40 KiB, 28672 x 4096 and 128256 x 4096 have 224 and 1002 of 128 columns
        with 48 KiB, of which an SM holds two. Each tile also reads its rows of x through L2: rows / columns as many
        bytes as of the weights, which is at most 1.
        """
        narrowest = self.tiles[0]
        min_splits = _ceil(self.programs, _ceil(num_outputs, narrowest.columns))
        splits = min(max(1, num_inputs // MIN_SPLIT_INPUTS), 1 << (min_splits - 1).bit_length())
        chosen = [(1, narrowest)]
        for smaller, tile in pairwise(self.tiles):
            if splits > 1 and tile.sums_per_thread > MAX_SPLIT_SUMS:
                continue
            row_tiles = _ceil(self.programs, _ceil(num_outputs, tile.columns) * splits)
            most_are_used = tile.rows // 2 + 1 if tile.rows > narrowest.rows else 1
            first = max((row_tiles - 1) * tile.rows + 1, most_are_used)
            if min(smaller.rows, smaller.columns) < MIN_SIDE:
                first = min(first, min(smaller.rows, smaller.columns) + 1)
            chosen = [*((rows, other) for rows, other in chosen if rows < first), (first, tile)]
        return LinearTiles(self.inputs, self.programs, tuple(chosen), splits)


@dataclass(frozen=True)
class AttentionTiles:
    """The tile of attention: packed rows (tokens x query heads of a KV head), keys of a step, and keys of a segment.

    A segment is a whole number of steps, and starts at a multiple of its length. Each segment is computed by itself and
    merged afterwards, whether one program computes all segments or one each.

    Prompts and decoding have the same 64 packed rows, the least of a product on an H100 (wgmma), and so the same bits.
    A decoding sequence with 4 query heads for each KV head fills 4 of them. Nothing is loaded for the others, but their
    products are computed: for a key and a value of D numbers in 16 bits, 4 x 64 x D operations for 4 x D bytes. At 64
    operations per byte, that takes 22 % of the time of the memory on an H100 (989 TFLOP/s, 3.35 TB/s), 42 % on an A100
    (312, 2.04), and 16 % on an L4 (121, 0.3); with an 8-bit KV cache, twice as much.
    """

    packed_rows: int
    keys: int
    segment: int
    num_warps: int
    # With five stages, the keys and values of the next step are loaded during a step: their loads come two stages after
    # that of the block table, which holds their addresses. With three or four, each step would wait for its own loads.
    num_stages: int
    programs: int  # that run at a time on a multiprocessor


@dataclass(frozen=True)
class Tiles:
    linear: LinearTable
    packed_linear: LinearTable  # for packed weights, of which a stage holds fewer bytes
    attention: AttentionTiles

    def linear_for(self, num_outputs: int, num_inputs: int, *, is_packed: bool) -> LinearTiles:
        """Return the tiles for weights of a shape."""
        return (self.packed_linear if is_packed else self.linear).tiles_for(num_outputs, num_inputs)

    def grouped_for(self, num_outputs: int, num_inputs: int, *, is_packed: bool) -> LinearTiles:
        """Return the tiles for products of several matrices, by the number of rows of one.

        `num_outputs` are those of all matrices that a row is multiplied with. There are enough of them without splits.
        """
        return replace(self.linear_for(num_outputs, num_inputs, is_packed=is_packed), splits=1)

    def attention_for(self, head_dim: int) -> AttentionTiles:
        """Return the tile for a head size.

        Larger heads take twice the registers: of twice the warps, one program. The largest also get fewer packed rows,
        since a program holds D sums for each.
        """
        tiles = self.attention
        if head_dim <= MAX_SMALL_HEAD:
            return tiles
        larger = replace(
            tiles, keys=max(16, tiles.keys // 2), num_warps=2 * tiles.num_warps, programs=tiles.programs // 2
        )
        if head_dim <= MAX_LARGE_HEAD:
            return larger
        return replace(larger, packed_rows=16, keys=16, num_stages=tiles.num_stages if head_dim <= MAX_WIDE_HEAD else 2)


def _linear_table(programs: int, *tiles: tuple[int, int, int, int]) -> LinearTable:
    """Return a table for tiles (rows, columns, warps, stages)."""
    return LinearTable(64, programs, tuple(LinearTile(*tile) for tile in tiles))


SMALLEST_LINEAR = LinearTable(32, 64, (LinearTile(32, 64, 4, 2),))
SMALLEST = Tiles(SMALLEST_LINEAR, SMALLEST_LINEAR, AttentionTiles(16, 16, 256, 4, 2, programs=4))

# The largest are what registers allow: 64 sums of a thread with mma.sync, 128 with wgmma and tcgen05.
LINEAR_8_0 = _linear_table(80, (32, 32, 4, 6), (64, 64, 4, 5), (64, 128, 4, 3), (128, 128, 8, 3))
LINEAR_8_6 = _linear_table(64, (32, 32, 4, 5), (64, 64, 4, 4), (64, 128, 4, 3), (128, 128, 8, 3))
LINEAR_9_0 = _linear_table(96, (64, 32, 4, 8), (64, 64, 4, 6), (64, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 4))
LINEAR_10_0 = _linear_table(128, (64, 32, 4, 12), (64, 64, 4, 10), (64, 128, 4, 6), (128, 128, 8, 4), (128, 256, 8, 4))
LINEAR_12_0 = _linear_table(128, (32, 32, 4, 6), (64, 64, 4, 5), (64, 128, 4, 3), (128, 128, 8, 3))
PACKED_8_0 = _linear_table(80, (32, 32, 4, 8), (64, 64, 4, 6), (64, 128, 4, 4), (128, 128, 8, 3))
PACKED_8_6 = _linear_table(64, (32, 32, 4, 8), (64, 64, 4, 5), (64, 128, 4, 3), (128, 128, 8, 3))
PACKED_9_0 = _linear_table(96, (64, 32, 4, 14), (64, 64, 4, 10), (64, 128, 4, 5), (128, 128, 8, 3))
PACKED_10_0 = _linear_table(128, (64, 32, 4, 14), (64, 64, 4, 12), (64, 128, 4, 8), (128, 128, 8, 4))

# By NVIDIA's compute capability; a card uses the newest entry that is not newer than itself.
TABLE: dict[tuple[int, int], Tiles] = {
    (0, 0): SMALLEST,
    (8, 0): Tiles(LINEAR_8_0, PACKED_8_0, AttentionTiles(64, 32, 256, 4, 5, programs=2)),
    # 8.6 and 8.9 have less shared memory.
    (8, 6): Tiles(LINEAR_8_6, PACKED_8_6, AttentionTiles(64, 16, 256, 4, 5, programs=2)),
    (9, 0): Tiles(LINEAR_9_0, PACKED_9_0, AttentionTiles(64, 64, 256, 4, 5, programs=2)),
    (10, 0): Tiles(LINEAR_10_0, PACKED_10_0, AttentionTiles(64, 32, 256, 4, 5, programs=2)),
    # Shared memory as on 8.6.
    (12, 0): Tiles(LINEAR_12_0, PACKED_8_6, AttentionTiles(64, 16, 256, 4, 5, programs=2)),
}


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return NVIDIA's compute capability of a card; None for other devices."""
    return torch.cuda.get_device_capability(device) if _is_nvidia(device) else None


def tiles_for(capability: tuple[int, int] | None, dtype: torch.dtype) -> Tiles:
    """Return the tiles of a card. float32, which tensor cores would round, and other makers' cards get the smallest."""
    if capability is None or dtype == torch.float32:
        return SMALLEST
    return TABLE[max(key for key in TABLE if key <= capability)]


def num_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (compute units) of a card; in Triton's interpreter, a small number."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def card_name(device: torch.device) -> str:
    """Return the architecture of a card, on which the last bits of an answer may depend."""
    if _is_nvidia(device):
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    return "interpreter"


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
