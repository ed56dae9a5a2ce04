"""From the tensors of a checkpoint to those of mixers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from engine.config import GatedDeltaNetSpec, MixerSpec, ShortConvSpec
from engine.weights.packed import Weight, select_rows

DECAYS = {"linear_attn.A_log": 1, "linear_attn.negative_decay": -1}


def mixer_tensors(part: str, weight: Weight, spec: MixerSpec) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of a mixer that one of a checkpoint holds.

    Raises ValueError if its rows do not divide, or if it has numbers with which no state stays finite.
    """
    if isinstance(weight, Tensor) and "_proj." not in part:  # it has few numbers
        if part in DECAYS:
            part, weight = "linear_attn.decay", weight.float().exp() if DECAYS[part] > 0 else -weight
        if not weight.float().isfinite().all() or (part == "linear_attn.decay" and (weight < 0).any()):
            raise ValueError("has numbers that are not finite, or decays below 0")
    if part.endswith(("conv1d.weight", "conv.conv.weight")) and isinstance(weight, Tensor) and weight.ndim == 3:
        yield part, weight.squeeze(1)
    elif part == "linear_attn.in_proj_qkvz.weight" and isinstance(spec, GatedDeltaNetSpec):
        values = spec.num_value_heads // spec.num_key_heads * spec.value_head_dim
        q, k, v, z = _parts_of_heads(weight, spec, (spec.key_head_dim, spec.key_head_dim, values, values))
        yield "linear_attn.in_proj_qkv.weight", select_rows(weight, np.concatenate((q, k, v)))
        yield "linear_attn.in_proj_z.weight", select_rows(weight, z)
    elif part == "linear_attn.in_proj_ba.weight" and isinstance(spec, GatedDeltaNetSpec):
        values = spec.num_value_heads // spec.num_key_heads
        for name, rows in zip("ba", _parts_of_heads(weight, spec, (values, values)), strict=True):
            yield f"linear_attn.in_proj_{name}.weight", select_rows(weight, rows)
    else:
        yield part, weight


def module_shapes(spec: MixerSpec, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Return the shapes [M, K] of a mixer's projections, by name within the layer."""
    if isinstance(spec, ShortConvSpec):
        size = spec.num_channels
        return {"conv.in_proj": (3 * size, hidden_size), "conv.out_proj": (hidden_size, size)}
    value_size = spec.num_value_heads * spec.value_head_dim
    sizes = {"qkv": spec.num_channels, "z": value_size, "b": spec.num_value_heads, "a": spec.num_value_heads}
    shapes = {f"linear_attn.in_proj_{name}": (size, hidden_size) for name, size in sizes.items()}
    return shapes | {"linear_attn.out_proj": (hidden_size, value_size)}


def _parts_of_heads(weight: Weight, spec: GatedDeltaNetSpec, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Return the rows of each part of a matrix whose rows are those of all parts of one key head, then of the next."""
    if weight.shape[0] != spec.num_key_heads * sum(sizes):
        raise ValueError(f"has {weight.shape[0]} rows, but {spec.num_key_heads} key heads have {sum(sizes)} each")
    rows = np.arange(weight.shape[0]).reshape(spec.num_key_heads, -1)
    return [part.reshape(-1) for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)]
