"""Read rotary embeddings from `rope_parameters` or `rope_scaling`, as transformers does (modeling_rope_utils.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from engine.config.fields import Fields, shown
from engine.config.layers import RopeScaling, RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def rope_fields(fields: Fields) -> Fields | None:
    """Return the fields of the rotary embedding, if the file has any: `rope_scaling` of older files comes first."""
    return fields.nested("rope_scaling") or fields.nested("rope_parameters")


def read_layer_rope(
    fields: Fields, kind: str, head_dim: int, local_theta: str | None, names: Mapping[str, str]
) -> RopeSpec:
    """Return the rotary embedding of layers of a type.

    Newer files have `rope_parameters`, for all layers or for each type; older ones `rope_theta` and `rope_scaling`.
    `local_theta` is the key of the base of sliding layers, which are not scaled; None: they are like the others.
    `names`: other names of types of scaling.
    """
    parameters = fields.nested("rope_parameters")
    if parameters is not None and isinstance(parameters.get(FULL), dict):
        return read_rope(fields, parameters.nested(kind), head_dim, names)
    rope = rope_fields(fields)
    if kind == FULL or local_theta is None:
        return read_rope(fields, rope, head_dim, names)
    theta = fields.number(local_theta, 10000.0, zero=False)
    if local_theta == "rope_theta" and rope is not None:
        theta = rope.number("rope_theta", theta, zero=False)
    return RopeSpec(head_dim=head_dim, rotary_dim=_rotary_dim(fields, rope, head_dim), theta=theta)


def read_rope(fields: Fields, rope: Fields | None, head_dim: int, names: Mapping[str, str]) -> RopeSpec:
    """Return the rotary embedding that `rope` describes, with defaults from the outer `fields`."""
    rope = rope or Fields(fields.source, {})
    kind = rope.string("rope_type", rope.string("type", "default"))
    kind = names.get(kind, kind)
    rotary_dim = _rotary_dim(fields, rope, head_dim)
    return RopeSpec(
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        theta=_theta(rope, fields),
        is_proportional=kind == "proportional",
        scaling=_scaling(kind, rope, fields, rotary_dim),
        query_beta=rope.number("llama_4_scaling_beta", 0.0),
        query_context=_original_context(rope, fields),
    )


def _theta(rope: Fields, fields: Fields) -> float:
    return rope.number("rope_theta", fields.number("rope_theta", 10000.0, zero=False), zero=False)


def _rotary_dim(fields: Fields, rope: Fields | None, head_dim: int) -> int:
    share = fields.number("partial_rotary_factor", 1.0, zero=False)
    if rope is not None:
        share = rope.number("partial_rotary_factor", share, zero=False)
    rotary_dim = fields.integer("rotary_dim", 2 * (int(head_dim * min(share, 1.0)) // 2), minimum=0)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise fields.error("rotary_dim", f"must be even and at most the head size {head_dim}, not {rotary_dim}")
    return rotary_dim


def _scaling(kind: str, rope: Fields, fields: Fields, rotary_dim: int) -> RopeScaling:
    if kind == "proportional" and (factor := rope.number("factor", 1.0, zero=False)) != 1.0:
        return RopeScaling(rope_type="linear", factor=factor)
    if kind in ("default", "proportional", "mrope"):
        return RopeScaling()
    if kind not in SCALINGS:
        supported = ", ".join(("default", *SCALINGS, "proportional"))
        raise rope.error("rope_type", f"{shown(kind)} is not supported (supported: {supported})")
    return SCALINGS[kind](rope, fields, rotary_dim)


def _linear(rope: Fields, fields: Fields, rotary_dim: int) -> RopeScaling:
    return RopeScaling(rope_type="linear", factor=rope.number("factor", None, zero=False))


def _llama3(rope: Fields, fields: Fields, rotary_dim: int) -> RopeScaling:
    scaling = RopeScaling(
        rope_type="llama3",
        factor=rope.number("factor", None, zero=False),
        low_freq_factor=rope.number("low_freq_factor", 1.0, zero=False),
        high_freq_factor=rope.number("high_freq_factor", 4.0, zero=False),
        original_max_position_embeddings=_original_context(rope, fields),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise rope.error("high_freq_factor", f"must be greater than low_freq_factor ({scaling.low_freq_factor})")
    return scaling


def _yarn(rope: Fields, fields: Fields, rotary_dim: int) -> RopeScaling:
    context = _original_context(rope, fields)
    factor = rope.number("factor", fields.integer("max_position_embeddings") / context, zero=False)
    if _theta(rope, fields) <= 1:
        raise (rope if "rope_theta" in rope else fields).error("rope_theta", "must be greater than 1 for yarn")
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    attention_factor = yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=context,
        attention_factor=rope.number("attention_factor", attention_factor, zero=False),
        beta_fast=rope.number("beta_fast", 32.0, zero=False),
        beta_slow=rope.number("beta_slow", 1.0, zero=False),
        truncate=rope.boolean("truncate", default=True),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return by how much attention is sharpened for a context that is stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Fields, fields: Fields, rotary_dim: int) -> RopeScaling:
    context = _original_context(rope, fields)
    if context == 1:
        raise rope.error("original_max_position_embeddings", "must be greater than 1")
    factor = rope.number("factor", fields.integer("max_position_embeddings") / context, zero=False)
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return RopeScaling(
        rope_type="longrope",
        factor=factor,
        original_max_position_embeddings=context,
        attention_factor=rope.number("attention_factor", attention_factor, zero=False),
        short_factor=rope.numbers("short_factor", rotary_dim // 2),
        long_factor=rope.numbers("long_factor", rotary_dim // 2),
    )


def _original_context(rope: Fields, fields: Fields) -> int:
    """Return the context of the pretraining, of which transformers takes the outer key first."""
    inner = rope.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    return fields.integer("original_max_position_embeddings", inner)


SCALINGS: dict[str, Callable[[Fields, Fields, int], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
