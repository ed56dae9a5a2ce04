"""Rotary position embeddings (RoPE, Su et al. 2021): the rotation angle of each pair of dimensions at each position."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.config import RopeScaling, RopeSpec
from engine.kernels.interface import Kernels, Rotations
from engine.kernels.lazy_memory import lazy_zeros

CHUNK = 1 << 15  # rows that are computed at a time


class RotaryEmbedding:
    """Tables float32 [max_model_len, D], one row per position: the cosines of D / 2 pairs, then their sines.

    The rows of long contexts are computed when a request first gets there.
    """

    def __init__(
        self, rope: RopeSpec, max_model_len: int, device: torch.device, allowed_len: int | None = None
    ) -> None:
        """`allowed_len`: the context that the settings allow, where memory holds less. Rotations are made for it."""
        self.rope = rope
        self.frequencies = inverse_frequencies(rope, allowed_len or max_model_len)
        shape = (max_model_len, rope.head_dim // 2 * 2)
        self.k = lazy_zeros(shape, torch.float32, device)
        self.q = lazy_zeros(shape, torch.float32, device) if rope.query_beta else self.k
        self.num_rows = 0  # that have been computed
        self.extend(1)

    def extend(self, num_rows: int) -> None:
        """Compute the rows that are missing among the first `num_rows`."""
        while self.num_rows < min(num_rows, len(self.k)):
            end = min(self.num_rows + CHUNK, len(self.k))
            self._compute(self.num_rows, end)
            self.num_rows = end

    def _compute(self, start: int, end: int) -> None:
        """Fill in the rows of positions start .. end. Pairs that are not rotated get cosine 1 and sine 0."""
        rope, num_pairs = self.rope, self.rope.head_dim // 2
        positions = torch.arange(start, end, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies
        cos, sin = torch.ones(end - start, num_pairs), torch.zeros(end - start, num_pairs)
        rotated = slice(rope.first_pair, rope.first_pair + len(self.frequencies))
        cos[:, rotated] = angles.cos() * rope.scaling.attention_factor
        sin[:, rotated] = angles.sin() * rope.scaling.attention_factor
        table = torch.cat((cos, sin), dim=1)
        self.k[start:end] = table.to(self.k.device)
        if self.q is not self.k:
            scale = 1 + rope.query_beta * torch.log1p(torch.floor(positions / rope.query_context))
            self.q[start:end] = (table * scale[:, None]).to(self.q.device)

    def gather(self, kernels: Kernels, positions: Tensor) -> Rotations:
        """Return the rotations at positions [T]."""
        return gather_rotations(kernels, Rotations(self.q, self.k), positions)


def table_bytes(ropes: Iterable[RopeSpec], max_model_len: int) -> int:
    """Return the bytes of the tables for contexts of this length."""
    return sum(max_model_len * rope.head_dim * 4 * (2 if rope.query_beta else 1) for rope in ropes)


def gather_rotations(kernels: Kernels, rotations: Rotations, rows: Tensor) -> Rotations:
    """Return some rows of rotations."""
    k = kernels.gather(rotations.k, rows)
    return Rotations(k if rotations.q is rotations.k else kernels.gather(rotations.q, rows), k)


def inverse_frequencies(rope: RopeSpec, allowed_len: int) -> Tensor:
    """Return the rotation of each rotated pair per position, in radians, after scaling: float32 [R / 2].

    LongRoPE has other factors for contexts that may be longer than the original one (`allowed_len` tokens).
    """
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
        is_long = allowed_len > scaling.original_max_position_embeddings
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
