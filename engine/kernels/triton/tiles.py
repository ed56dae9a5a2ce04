"""Tile sizes of the kernels, for each kind of card.

Tile sizes determine the order of additions, and with it the bits of an answer. So they never depend on a batch, and are
never tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# By default, the compiler may fuse a product with the sum after it, and so round once instead of twice. Its choice may
# differ between two kernels that must agree to the bit.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


MIN_COLUMNS = 64  # of a tile; with many rows, narrower tiles read x too often
MIN_SPLIT_INPUTS = 1024  # with fewer, a program ends before enough of its loads are in flight


@dataclass(frozen=True)
class LinearTiles:
    """The tile of a product x W^T: rows, columns and inputs of one step of a program, and splits of the inputs.

    Each split is added up by itself, and then the splits in order, whether one program computes all splits or one each.
    """

    rows: int
    columns: int
    inputs: int
    num_warps: int
    num_stages: int
    programs: int  # number that keeps the memory busy
    splits: int = 1


@dataclass(frozen=True)
class AttentionTiles:
    """The tile of attention: packed rows (tokens x query heads of a KV head), keys of a step, and keys of a segment.

    A segment is a whole number of steps, and starts at a multiple of its length. Each segment is computed by itself and
    merged afterwards, whether one program computes all segments or one each.
    """

    packed_rows: int
    keys: int
    segment: int
    num_warps: int
    # With five stages, the keys and values of the next step are loaded during a step: their loads come two stages after
    # that of the block table, which holds their addresses. With three or four, each step would wait for its own loads.
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    linear: LinearTiles
    attention: AttentionTiles

    def linear_for(self, num_outputs: int, num_inputs: int) -> LinearTiles:
        """Return the tile for weights of a shape, which is the same for any number of rows.

        With few rows, the time is that of reading the weights, and a program has (stages - 1) x columns x inputs of
        them in flight: 32 KiB for bfloat16 on an H100. Its memory has a latency of about 0.7 us and moves 3.35 TB/s, so
        about 2.3 MB must be in flight: 72 programs, and more because not all start at once. In Llama-3-8B,
        28672 x 4096 and 128256 x 4096 have that many tiles of 128 columns. 6144 x 4096 has 48, and two splits;
        4096 x 4096 and 4096 x 14336 have 32, and four splits. Only weights with too few inputs to split get narrower
        tiles.
        """
        tiles = self.linear
        most = max(1, num_inputs // MIN_SPLIT_INPUTS)
        columns = tiles.columns
        while columns > MIN_COLUMNS and -(-num_outputs // columns) * most < tiles.programs:
            columns //= 2
        min_splits = -(-tiles.programs // -(-num_outputs // columns))
        return replace(tiles, columns=columns, splits=min(most, 1 << (min_splits - 1).bit_length()))


SMALLEST = Tiles(LinearTiles(32, 64, 32, 4, 2, programs=64), AttentionTiles(16, 16, 256, 4, 2))

# By NVIDIA's compute capability; a card uses the newest entry that is not newer than itself.
TABLE: dict[tuple[int, int], Tiles] = {
    (0, 0): SMALLEST,
    (8, 0): Tiles(LinearTiles(64, 128, 64, 4, 3, programs=96), AttentionTiles(16, 64, 256, 4, 5)),
    # 8.6 and 8.9 have less shared memory.
    (8, 6): Tiles(LinearTiles(64, 64, 64, 4, 3, programs=64), AttentionTiles(16, 32, 256, 4, 5)),
    (9, 0): Tiles(LinearTiles(128, 128, 64, 8, 3, programs=96), AttentionTiles(16, 64, 256, 4, 5)),
    (12, 0): Tiles(
        LinearTiles(64, 64, 64, 4, 3, programs=96), AttentionTiles(16, 32, 256, 4, 5)
    ),  # shared memory as on 8.6
}


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return NVIDIA's compute capability of a card; None for other devices."""
    return torch.cuda.get_device_capability(device) if _is_nvidia(device) else None


def tiles_for(capability: tuple[int, int] | None, dtype: torch.dtype) -> Tiles:
    """Return the tiles of a card. float32, which tensor cores would round, and other makers' cards get the smallest."""
    if capability is None or dtype == torch.float32:
        return SMALLEST
    return TABLE[max(key for key in TABLE if key <= capability)]


def card_name(device: torch.device) -> str:
    """Return the architecture of a card, on which the last bits of an answer may depend."""
    if _is_nvidia(device):
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    return "interpreter"


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None
