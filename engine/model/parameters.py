"""The named tensors of a checkpoint, handed to the parts of the model that ask for them.

A part asks by the names of Hugging Face's checkpoints. Each tensor is used exactly once and each request is met, or
loading fails.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Parameters:
    """Tensors by name, taken out one by one."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = dict(tensors)
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; ValueError if it is missing or has another shape."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise ValueError(f"the checkpoint lacks the tensor {name} {list(shape)}")
        if tensor.shape != shape:
            raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def take_fused(self, names: Iterable[str], sizes: Iterable[int], *rest: int) -> Tensor:
        """Several tensors as one, along their first dimension."""
        return torch.cat([self.take(name, size, *rest) for name, size in zip(names, sizes, strict=True)])

    def finish(self) -> None:
        """ValueError if a tensor was not used."""
        if self._tensors:
            some = ", ".join(sorted(self._tensors)[:5])
            raise ValueError(f"the model has no use for {len(self._tensors)} tensors of the checkpoint: {some}")
