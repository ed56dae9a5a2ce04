"""The norms of the residual stream, and of what is added to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.model.linear import Parameters


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


class NoNorm:
    """Leaves the residual stream as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Sum:
    """Adds a result to the residual stream, in place."""

    def __call__(self, residual: Tensor, compute: Callable[[Tensor | None], Tensor]) -> None:
        """`compute` returns the result, or adds it to what it is given, which takes no memory for it."""
        compute(residual)


class ScaledSum(Sum):
    """Adds a multiple of a result."""

    def __init__(self, kernels: Kernels, scale: float) -> None:
        self.kernels = kernels
        self.scale = scale

    def __call__(self, residual: Tensor, compute: Callable[[Tensor | None], Tensor]) -> None:
        self.kernels.add(residual, compute(None), self.scale)


class NormedSum(Sum):
    """Adds a result through a norm."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def __call__(self, residual: Tensor, compute: Callable[[Tensor | None], Tensor]) -> None:
        self.norm.add(residual, compute(None))
