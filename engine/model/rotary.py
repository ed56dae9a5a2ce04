"""Rotary position embeddings (RoPE, Su et al. 2021): the rotation angle of each pair of dimensions at each position."""

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScaling


class RotaryEmbedding:
    """Tables `cos` and `sin`, float32 [max_model_len, D / 2], one row per position."""

    def __init__(self, config: ModelConfig, max_model_len: int, device: torch.device, factors: Tensor | None) -> None:
        frequencies = inverse_frequencies(config, factors)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)


def inverse_frequencies(config: ModelConfig, factors: Tensor | None) -> Tensor:
    """Return the rotation of each pair of dimensions per position, in radians, after scaling: float32 [D / 2].

    `factors` [D / 2] divide the frequencies; GGUF files store the scaling of Llama 3 in this form.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if factors is not None:
        return frequencies / factors.to(frequencies.device)
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Apply the scaling of Llama 3.1: stretch long wavelengths by `factor`, keep short ones, interpolate between."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < context / high, frequencies, stretched)
