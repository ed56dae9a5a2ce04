"""The named tensors of a checkpoint, which the parts of the model take one by one.

Names are those of Hugging Face's checkpoints. Loading fails unless each tensor is taken, and taken once.
"""

from collections.abc import Iterable

from torch import Tensor

from engine.weights import Weight


class Parameters:
    """The tensors of a checkpoint that have not been taken yet, by name."""

    def __init__(self, tensors: Iterable[tuple[str, Weight]]) -> None:
        self._tensors: dict[str, Weight] = {}
        for name, tensor in tensors:
            if name in self._tensors:
                raise ValueError(f"the checkpoint has the tensor {name} twice")
            self._tensors[name] = tensor
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def take(self, name: str, *shape: int) -> Tensor:
        """Remove and return a plain tensor. Raises ValueError if it is missing, has another shape, or is packed."""
        weight = self.take_weight(name, *shape)
        if not isinstance(weight, Tensor):
            raise ValueError(f"tensor {name} has type {weight.type_name}, which is supported for matrices only")
        return weight

    def take_weight(self, name: str, *shape: int) -> Weight:
        """Remove and return a weight, plain or packed. Raises ValueError if it is missing or has another shape."""
        weight = self._tensors.pop(name, None)
        if weight is None:
            raise ValueError(f"the checkpoint lacks the tensor {name} {list(shape)}")
        if weight.shape != shape:
            raise ValueError(f"tensor {name} has shape {list(weight.shape)}, expected {list(shape)}")
        return weight

    def finish(self) -> None:
        """Check that all tensors have been taken. Raises ValueError if any is left."""
        if self._tensors:
            some = ", ".join(sorted(self._tensors)[:5])
            raise ValueError(f"the model has no use for {len(self._tensors)} tensors of the checkpoint: {some}")
