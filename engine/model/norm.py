"""The norms of the residual stream, and of what is added to it."""

from __future__ import annotations

from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.model.parameters import Parameters


class Norm:
    """RMS norm (Zhang and Sennrich 2019), or layer norm without a bias (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig, parameters: Parameters, name: str, kernels: Kernels) -> None:
        self.weight = parameters.take(f"{name}.weight", config.hidden_size)
        self.kernels = kernels
        self.is_layer_norm = config.norm == "layer"
        self.eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.kernels.layer_norm if self.is_layer_norm else self.kernels.rms_norm
        return norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> None:
        """Add the normed x to the residual stream, in place."""
        self.kernels.rms_norm(x, self.weight, self.eps, residual)
