"""Linear layers: several projections of the same input as one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from engine.kernels.interface import Kernels
from engine.model.parameters import Parameters

Addition: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]  # of the input, the outputs, the slot of each row


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
