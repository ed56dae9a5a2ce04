"""The named tensors of a checkpoint, handed to the parts of the model that ask for them.

A part asks by the names of Hugging Face's checkpoints. Each tensor is used exactly once and each request is met, or
loading fails.
"""

from collections.abc import Iterable

from torch import Tensor

from engine.weights import Weight


class Parameters:
    """Tensors by name, taken out one by one."""

    def __init__(self, tensors: Iterable[tuple[str, Weight]]) -> None:
        self._tensors = dict(tensors)
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; ValueError if it is missing, has another shape, or is packed."""
        weight = self.take_weight(name, *shape)
        if not isinstance(weight, Tensor):
            raise ValueError(f"tensor {name} has type {weight.type_name}, which only matrices can have")
        return weight

    def take_weight(self, name: str, *shape: int) -> Weight:
        """The same for a matrix of weights, which may be packed."""
        weight = self._tensors.pop(name, None)
        if weight is None:
            raise ValueError(f"the checkpoint lacks the tensor {name} {list(shape)}")
        if weight.shape != shape:
            raise ValueError(f"tensor {name} has shape {list(weight.shape)}, expected {list(shape)}")
        return weight

    def finish(self) -> None:
        """ValueError if a tensor was not used."""
        if self._tensors:
            some = ", ".join(sorted(self._tensors)[:5])
            raise ValueError(f"the model has no use for {len(self._tensors)} tensors of the checkpoint: {some}")
