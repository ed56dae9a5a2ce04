"""What ranks do together: add up parts of a sum, and put parts of rows side by side.

Sums are those of all ranks' parts in the order of the ranks, whatever the number of rows is and whichever rank is
first, so a row's result has always the same bits, on each rank.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu.c_structs import MeetParameters
from engine.kernels.cpu.kernels import CpuKernels

COUNTER_BYTES = 64  # a cache line
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


class Collectives(Protocol):
    """The operations of all ranks. Each rank calls them in the same order, with the same number of rows."""

    def sum(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the sum of the ranks' x [T, K], or add it to `residual` in place and return that."""

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the columns of all ranks' x side by side. `sizes` are the numbers of columns of each rank."""


class TorchCollectives:
    """Collectives of torch.distributed: gloo on CPUs, NCCL on GPUs."""

    def sum(self, x: Tensor, residual: Tensor | None) -> Tensor:
        first, *others = self._all(x)
        total = first.float()
        for part in others:
            total = total + part
        total = total.to(x.dtype)
        return total if residual is None else residual.add_(total)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[1]))
        return torch.cat([part[:, :size] for part, size in zip(self._all(padded), sizes, strict=True)], dim=1)

    def _all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return parts


class CpuCollectives:
    """Adds the calls of collectives in C++, through shared memory, to the program that is being recorded.

    Each process writes its part to its own slot, waits until all have written theirs, and reads all slots. Successive
    exchanges use two sets of slots in turn: once a process writes to a set again, all have written to the other one,
    and so have read this. All have to meet in another way before a recorded program runs again, which begins with the
    same sets.
    """

    def __init__(self, kernels: CpuKernels, memory: SharedMemory, rank: int, num_ranks: int) -> None:
        self.kernels = kernels
        self.rank = rank
        self.num_ranks = num_ranks
        self._memory = memory
        self._counters = memory.take(num_ranks * COUNTER_BYTES)  # of each process: how often it has come to a meeting
        self._num_met = np.zeros(1, dtype=np.int64)  # meetings of this process
        # By shape: two sets, the next one first.
        self._slots: dict[tuple[int, tuple[int, ...]], list[list[Tensor]]] = {}

    def sum(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Add calls that sum up all processes' x in the order of their ranks, and return the result."""
        num_rows, parts = self.kernels.buffer(x).num_rows, self._exchange(x, [x.shape[1]] * self.num_ranks)
        if residual is None:
            residual = self.kernels.new(num_rows, *x.shape).tensor
            self.kernels.copy(num_rows, parts.pop(0), residual)
        for part in parts:
            self.kernels.add(residual, part, 1.0)
        return residual

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Add calls that put all processes' columns side by side, and return the result."""
        num_rows = self.kernels.buffer(x).num_rows
        out = self.kernels.new(num_rows, len(x), sum(sizes)).tensor
        for part, columns in zip(self._exchange(x, sizes), torch.split(out, list(sizes), dim=1), strict=True):
            self.kernels.copy(num_rows, part, columns)
        return out

    def _exchange(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Add calls after which all processes' x are in the slots that are returned, until the next exchange."""
        slots = self._next_slots(len(x), tuple(sizes))
        self.kernels.copy(self.kernels.buffer(x).num_rows, x, slots[self.rank])
        parameters = MeetParameters(
            counters=self._counters.data_ptr(),
            num_met=self._num_met.ctypes.data,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )
        self.kernels.call("meet", parameters, self._counters, self._num_met, slots)
        return list(slots)

    def _next_slots(self, num_rows: int, sizes: tuple[int, ...]) -> list[Tensor]:
        key = (num_rows, sizes)
        if key not in self._slots:
            self._slots[key] = [[self._new_slot(num_rows, size) for size in sizes] for _ in range(2)]
        self._slots[key].reverse()
        return self._slots[key][0]

    def _new_slot(self, num_rows: int, size: int) -> Tensor:
        return self._memory.take(num_rows * size * torch.float32.itemsize).view(torch.float32).view(num_rows, size)
