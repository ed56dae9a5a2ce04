"""Rotary position embeddings (RoPE, Su et al. 2021): the rotation angle of each pair of dimensions at each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import RopeScaling, RopeSpec
from engine.kernels.interface import Kernels, Rotations


class RotaryEmbedding:
    """Tables float32 [max_model_len, D], one row per position: the cosines of D / 2 pairs, then their sines."""

    def __init__(self, rope: RopeSpec, max_model_len: int, device: torch.device) -> None:
        positions = torch.arange(max_model_len, dtype=torch.float32)
        frequencies = inverse_frequencies(rope, max_model_len)
        angles = positions[:, None] * frequencies
        num_pairs = rope.head_dim // 2
        cos, sin = torch.ones(max_model_len, num_pairs), torch.zeros(max_model_len, num_pairs)
        rotated = slice(rope.first_pair, rope.first_pair + len(frequencies))
        cos[:, rotated] = angles.cos() * rope.scaling.attention_factor
        sin[:, rotated] = angles.sin() * rope.scaling.attention_factor
        table = torch.cat((cos, sin), dim=1)
        self.k = table.to(device)
        self.q = self.k
        if rope.query_beta:
            scale = 1 + rope.query_beta * torch.log1p(torch.floor(positions / rope.query_context))
            self.q = (table * scale[:, None]).to(device)

    def gather(self, kernels: Kernels, positions: Tensor) -> Rotations:
        """Return the rotations at positions [T]."""
        return gather_rotations(kernels, Rotations(self.q, self.k), positions)


def gather_rotations(kernels: Kernels, rotations: Rotations, rows: Tensor) -> Rotations:
    """Return some rows of rotations."""
    k = kernels.gather(rotations.k, rows)
    return Rotations(k if rotations.q is rotations.k else kernels.gather(rotations.q, rows), k)


def inverse_frequencies(rope: RopeSpec, max_model_len: int) -> Tensor:
    """Return the rotation of each rotated pair per position, in radians, after scaling: float32 [R / 2]."""
    base = rope.head_dim if rope.is_proportional else rope.rotary_dim
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / max(1, base)
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, rope)
    if scaling.rope_type == "longrope":
        is_long = max_model_len > scaling.original_max_position_embeddings
        return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
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


def _yarn(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Apply YaRN (Peng et al. 2023): stretch pairs that rarely turn in the original context, keep the others."""
    scaling = rope.scaling

    def pair_of(turns: float) -> float:
        """Return the pair that turns so often, as a real number."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
