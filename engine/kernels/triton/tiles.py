"""How large the pieces are that the kernels take at a time, for each kind of card.

They are part of the answer: another size adds up in another order. So nothing here depends on a batch, and nothing is
tuned while the server runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Whether a product and the sum after it are rounded once or twice is the compiler's choice otherwise, and may differ
# between two kernels that must agree to the bit.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


MIN_COLUMNS = 64  # of a tile. Narrower ones read x too often where there are many rows
MIN_SPLIT_INPUTS = 1024  # with fewer, a program is done before its loads are under way


@dataclass(frozen=True)
class LinearTiles:
    """Of a product x W^T: rows, columns and inputs of one step of a program, and how many parts the inputs have.

    The parts are added up each by itself and then in order, whether one program goes through all or one takes each.
    """

    rows: int
    columns: int
    inputs: int
    num_warps: int
    num_stages: int
    programs: int  # that keep the memory busy
    splits: int = 1


@dataclass(frozen=True)
class AttentionTiles:
    """Packed rows (tokens x query heads of a KV head) of a program, keys of a step, and keys of a segment.

    A segment is a whole number of steps, and starts at a multiple of its length. What rows have seen of it is worked
    out by itself and merged afterwards, whether one program goes through all segments or one takes each.
    """

    packed_rows: int
    keys: int
    segment: int
    num_warps: int
    # Five let the keys and values of the next step come while one is computed: theirs are two after the table's that
    # says where they lie. With three or four each step would wait for its own.
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    linear: LinearTiles
    attention: AttentionTiles

    def linear_for(self, num_outputs: int, num_inputs: int) -> LinearTiles:
        """For weights of a shape, whatever the number of rows.

        With few rows the time is that of reading the weights, and a program has (stages - 1) x columns x inputs of them
        on their way: 32 KiB for bfloat16 on an H100. Its memory takes about 0.7 us to answer and moves 3.35 TB/s, so
        that some 2.3 MB must be on their way: 72 programs, and more because not all start at once. Of Llama-3-8B,
        28672 x 4096 and 128256 x 4096 have that many tiles of 128 columns. 6144 x 4096 has 48, and two splits; 4096 x
        4096 and 4096 x 14336 have 32, and four. Only what has too few inputs to split gets narrower tiles.
        """
        tiles = self.linear
        most = max(1, num_inputs // MIN_SPLIT_INPUTS)
        columns = tiles.columns
        while columns > MIN_COLUMNS and -(-num_outputs // columns) * most < tiles.programs:
            columns //= 2
        wanted = -(-tiles.programs // -(-num_outputs // columns))
        return replace(tiles, columns=columns, splits=min(most, 1 << (wanted - 1).bit_length()))


SMALLEST = Tiles(LinearTiles(32, 64, 32, 4, 2, programs=64), AttentionTiles(16, 16, 256, 4, 2))

# By NVIDIA's compute capability, the newest that is not newer than the card.
TABLE: dict[tuple[int, int], Tiles] = {
    (0, 0): SMALLEST,
    (8, 0): Tiles(LinearTiles(64, 128, 64, 4, 3, programs=96), AttentionTiles(16, 64, 256, 4, 5)),
    (8, 6): Tiles(
        LinearTiles(64, 64, 64, 4, 3, programs=64), AttentionTiles(16, 32, 256, 4, 5)
    ),  # less shared memory, 8.9 too
    (9, 0): Tiles(LinearTiles(128, 128, 64, 8, 3, programs=96), AttentionTiles(16, 64, 256, 4, 5)),
    (12, 0): Tiles(LinearTiles(64, 64, 64, 4, 3, programs=96), AttentionTiles(16, 32, 256, 4, 5)),  # as 8.6
}


def tiles_for(device: torch.device, dtype: torch.dtype) -> Tiles:
    """For a card. float32, which no unit for products takes as it is, and cards of other makers get the smallest."""
    if not _is_nvidia(device) or dtype == torch.float32:
        return SMALLEST
    capability = torch.cuda.get_device_capability(device)
    return TABLE[max(key for key in TABLE if key <= capability)]


def card_name(device: torch.device) -> str:
    """The architecture, on which the last bits of an answer may depend."""
    if _is_nvidia(device):
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    return "interpreter"


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None
