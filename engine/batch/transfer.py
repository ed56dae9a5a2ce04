"""Asynchronous copies between host and device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor


def packed_copy(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device, in one asynchronous copy."""
    sizes = [-(-array.size // 2) * 2 for array in arrays]  # kernels are compiled for 16-byte alignment
    packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    for part, array in zip(torch.split(packed, sizes), arrays, strict=True):
        part[: array.size].view(array.shape).copy_(torch.from_numpy(array))
    parts = torch.split(packed.to(device, non_blocking=True), sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def to_device(values: ArrayLike, dtype: DTypeLike, device: torch.device) -> Tensor:
    """Copy host numbers to a device asynchronously."""
    return send(torch.from_numpy(np.asarray(values, dtype)), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device asynchronously."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class HostCopy:
    """An asynchronous copy of a tensor to the host. Reading it waits."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
