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


# By NVIDIA's compute capability, the newest that is not newer than the card. All else takes the first.
TABLE: dict[tuple[int, int], Tiles] = {
    (0, 0): Tiles(LinearTiles(32, 64, 32, 4, 2), AttentionTiles(16, 32, 512, 4, 2)),
    (8, 0): Tiles(LinearTiles(64, 128, 64, 4, 3), AttentionTiles(16, 64, 512, 4, 3)),
    (9, 0): Tiles(LinearTiles(64, 128, 128, 4, 4), AttentionTiles(16, 64, 1024, 4, 3)),
}


def tiles_for(device: torch.device) -> tuple[str, Tiles]:
    """Those of a card, and what they are called."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)
    major, minor = max(key for key in TABLE if key <= capability)
    return f"{major}.{minor}", TABLE[major, minor]
