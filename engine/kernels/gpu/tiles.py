"""How large the pieces are that the kernels take at a time, for each kind of card.

They are part of the answer: another size adds up in another order. So nothing here depends on a batch, and nothing is
tuned while the server runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Whether a product and the sum after it are rounded once or twice is the compiler's choice otherwise, and may differ
# between two kernels that must agree to the bit.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class LinearTiles:
    """Of a product x W^T: rows, columns and inputs of one step of a program."""

    rows: int
    columns: int
    inputs: int
    num_warps: int
    num_stages: int


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
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    linear: LinearTiles
    attention: AttentionTiles


SMALLEST = Tiles(LinearTiles(32, 64, 32, 4, 2), AttentionTiles(16, 16, 256, 4, 2))

# By NVIDIA's compute capability, the newest that is not newer than the card.
TABLE: dict[tuple[int, int], Tiles] = {
    (0, 0): SMALLEST,
    (8, 0): Tiles(LinearTiles(64, 128, 64, 4, 3), AttentionTiles(16, 64, 256, 4, 3)),
    (8, 6): Tiles(LinearTiles(64, 64, 64, 4, 3), AttentionTiles(16, 32, 256, 4, 2)),  # less shared memory, 8.9 too
    (9, 0): Tiles(LinearTiles(64, 128, 64, 4, 4), AttentionTiles(16, 64, 256, 4, 3)),
    (12, 0): Tiles(LinearTiles(64, 64, 64, 4, 3), AttentionTiles(16, 32, 256, 4, 2)),  # as 8.6
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
