"""Rotary position embeddings: the angle of each pair of dimensions at each position (Su et al. 2021)."""

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScaling


class RotaryEmbedding:
    """cos and sin, float32 [max_model_len, D / 2], of every position."""

    def __init__(self, config: ModelConfig, max_model_len: int, device: torch.device, factors: Tensor | None) -> None:
        frequencies = inverse_frequencies(config, factors)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)


def inverse_frequencies(config: ModelConfig, factors: Tensor | None) -> Tensor:
    """Angle per position of each of the D / 2 pairs, stretched as the model was trained for. float32.

    `factors` [D / 2] divide the frequencies; a GGUF file stores its scaling as such.
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
    """Long wavelengths are stretched by `factor`, short ones left, those between blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < context / high, frequencies, stretched)
