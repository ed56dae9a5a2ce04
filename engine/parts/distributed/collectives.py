"""What ranks do together: add up parts of a sum, and put parts of rows side by side.

Sums are those of all ranks' parts in the order of the ranks, whatever the number of rows is and whichever rank is
first, so a row's result has always the same bits, on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.kernels.interface import Kernels
from engine.parts.distributed.shared_memory import SharedMemory


class Collectives(Protocol):
    """The operations of all ranks. Each rank calls them in the same order, with the same number of rows."""

    def sum(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the sum of the ranks' x [T, K], or add it to `residual` in place and return that."""
        ...

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the columns of all ranks' x side by side. `sizes` are the numbers of columns of each rank."""
        ...


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


def cpu_collectives(kernels: Kernels, memory: SharedMemory, rank: int, num_ranks: int) -> Collectives:
    """Return the collectives of the C++ kernels."""
    from engine.kernels.cpu.collectives import CpuCollectives
    from engine.kernels.cpu.kernels import CpuKernels

    assert isinstance(kernels, CpuKernels)
    return CpuCollectives(kernels.recorder, memory.take, rank, num_ranks)
