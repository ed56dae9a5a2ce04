"""The named tensors of a checkpoint, which the parts of the model take one by one, and the linear layers made of them.

Names are those of Hugging Face's checkpoints. Loading fails unless each tensor is taken, and taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from engine.kernels.interface import Kernels
from engine.weights import Weight

Addition: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]  # of the input, the outputs, the slot of each row


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


class Linear:
    """A linear layer that computes several projections of the same input as one matrix product.

    `projections` are pairs of a name in the checkpoint and a number of outputs. The outputs are concatenated.
    `additions` change the outputs, in place.
    """

    def __init__(
        self,
        kernels: Kernels,
        parameters: Parameters,
        projections: list[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool,
    ) -> None:
        weights = [parameters.take_weight(f"{name}.weight", size, num_inputs) for name, size in projections]
        biases = [parameters.take(f"{name}.bias", size) for name, size in projections] if has_bias else []
        self.kernels = kernels
        self.names = [name for name, _ in projections]
        self.sizes = [size for _, size in projections]
        self.product = kernels.linear(kernels.pack(weights), torch.cat(biases) if biases else None)
        self.num_inputs = num_inputs
        self.additions: list[Addition] = []

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.product(x, residual)
        for add in self.additions:
            add(x, out, lora_slots)
        return out
