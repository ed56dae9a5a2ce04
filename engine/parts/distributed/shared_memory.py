"""Memory that all ranks of a group share. It has no name, and ends with the last of them."""

from __future__ import annotations

import math
import mmap
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_BYTES = 1 << 40  # of addresses: memory is taken when it is first written


class SharedMemory:
    """Hands out zeroed memory. All ranks take the same pieces in the same order, and so get the same memory."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: that of another rank's; None: create it."""
        self.descriptor = os.memfd_create("lightwell-ranks") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, MAX_BYTES)
        self._num_taken = 0

    def take(self, num_bytes: int) -> Tensor:
        """Return the next uint8 [num_bytes], at the start of a page."""
        pages = mmap.mmap(self.descriptor, max(1, num_bytes), offset=self._num_taken)
        self._num_taken += -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]

    def integers(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Return the next array of int64."""
        array: NDArray[np.int64] = self.take(8 * math.prod(shape)).view(torch.int64).view(shape).numpy()
        return array

    def close(self) -> None:
        """Close the descriptor. What was taken stays."""
        os.close(self.descriptor)
