"""Linear layers: several projections of the same input as one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.interface import Kernels
from engine.model.parameters import Parameters


class Linear:
    """A linear layer (plus LoRA) that computes several projections of the same input as one matrix product.

    `projections` are pairs of a name in the checkpoint and a number of outputs. The outputs are concatenated.
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
        self.lora = kernels.new_lora_weights(self.sizes, num_inputs)

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.product(x, residual)
        if self.lora is not None:
            self.kernels.add_lora(x, out, self.lora, lora_slots)
        return out
