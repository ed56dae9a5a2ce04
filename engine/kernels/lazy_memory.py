"""Zeroed memory that the operating system provides when it is first written."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

ARENA_BYTES = 64 * 2**20
ALIGNMENT = 64


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return zeros that take no memory on a CPU until they are written.

    torch.zeros writes its zeros. These come from the operating system, which provides a page when it is first written,
    a huge page if there is room.
    """
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return _huge_pages(num_bytes).view(dtype).view(shape)


class Arena:
    """Zeroed bytes in huge pages, handed out in order and freed together.

    With small pages, looking up the pages of weights costs as much as reading the weights.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return uint8 [num_bytes], aligned to a cache line."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._rest):
            self._rest = _huge_pages(max(size, ARENA_BYTES))
        taken, self._rest = self._rest[:num_bytes], self._rest[size:]
        return taken


def _huge_pages(num_bytes: int) -> Tensor:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
