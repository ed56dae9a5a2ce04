"""Random tensors, and row operations in float64 to compare results with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return the activation of gpt-oss, as in transformers' GptOssExperts."""
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def assert_close(actual: Tensor, expected: Tensor, rounding: torch.dtype) -> None:
    """Within a few roundings to a format, of numbers near 1."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}[rounding]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
