"""Read from a model's files which layers have a state in place of attention, and its sizes.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.fields import Fields, shown
from engine.config.layers import GatedDeltaNetSpec, MixerSpec, ShortConvSpec

MAX_CONV_SIZE = 16
MAX_HEAD_DIM = 256  # of a gated delta net: the kernels support no more
LANES = 16  # heads are a multiple of
ATTENTION, MIXER = "full_attention", "mixer"
TYPES = {"gated_delta_net": "linear_attention", "short_conv": "conv"}  # in layer_types


def complete(mixer: str, fields: Fields) -> Fields:
    """Return the fields with the types of layers, and the sizes that follow from others. Raises ValueError."""
    num_layers = fields.integer("num_hidden_layers")
    values: dict[str, Any] = {"layer_types": _layer_types(mixer, fields, num_layers)}
    if ATTENTION not in values["layer_types"]:
        raise fields.error("layer_types", f"no layer has {ATTENTION}, which is not supported")
    if mixer == "short_conv":
        num_dense = fields.integer("num_dense_layers", 0, minimum=0)
        values["first_k_dense_replace"] = fields.integer("first_k_dense_replace", num_dense, minimum=0)
        values["intermediate_size"] = _adjusted_size(fields)
    return fields.with_values(values)


def _layer_types(mixer: str, fields: Fields, num_layers: int) -> list[Any]:
    """Return full_attention or mixer for each layer."""
    if types := fields.get("layer_types"):
        supported = (ATTENTION, TYPES[mixer])
        others = [kind for kind in types if kind not in supported] if isinstance(types, list) else [types]
        if others:
            problem = f"{shown(others[0])} is not supported (supported: {', '.join(supported)})"
            raise fields.error("layer_types", problem)
        return [ATTENTION if kind == ATTENTION else MIXER for kind in types]
    if isinstance(recurrent := fields.get("recurrent_layers"), list):  # with those that predict later tokens
        if len(recurrent) < num_layers:
            raise fields.error("recurrent_layers", f"has {len(recurrent)} elements, but there are {num_layers} layers")
        return [MIXER if is_recurrent else ATTENTION for is_recurrent in recurrent[:num_layers]]
    if mixer == "gated_delta_net":
        interval = fields.integer("full_attention_interval", 4, maximum=num_layers)
        return [MIXER if (index + 1) % interval else ATTENTION for index in range(num_layers)]
    indices = fields.get("full_attn_idxs")
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise fields.error("full_attn_idxs", f"must be numbers of layers, not {shown(indices)}")
    return [ATTENTION if index in indices else MIXER for index in range(num_layers)]


def _adjusted_size(fields: Fields) -> int:
    """Return the size of the MLP of LFM 2: two thirds of what the file says, rounded up, unless that is off."""
    size = fields.integer("block_ff_dim", fields.integer("intermediate_size"))
    if not fields.boolean("block_auto_adjust_ff_dim"):
        return size
    size = int(fields.number("block_ffn_dim_multiplier", 1.0) * int(2 * size / 3))
    multiple = fields.integer("block_multiple_of", 256)
    return -(-size // multiple) * multiple


def read_mixer(mixer: str, fields: Fields) -> MixerSpec:
    """Return what a layer has in place of attention. Raises ValueError, which names the file and the key."""
    if mixer == "short_conv":
        return ShortConvSpec(
            num_channels=fields.integer("hidden_size"),
            conv_size=fields.integer("conv_L_cache", 3, minimum=2, maximum=MAX_CONV_SIZE),
            bias=fields.boolean("conv_bias"),
        )
    spec = GatedDeltaNetSpec(
        num_key_heads=fields.integer("linear_num_key_heads", 16),
        num_value_heads=fields.integer("linear_num_value_heads", 32),
        key_head_dim=fields.integer("linear_key_head_dim", 128),
        value_head_dim=fields.integer("linear_value_head_dim", 128),
        conv_size=fields.integer("linear_conv_kernel_dim", 4, minimum=2, maximum=MAX_CONV_SIZE),
        is_tiled=fields.boolean("linear_heads_tiled"),
    )
    if spec.num_value_heads % spec.num_key_heads:
        problem = f"{spec.num_value_heads} value heads are no multiple of {spec.num_key_heads} key heads"
        raise fields.error("linear_num_value_heads", problem)
    for key, size in (("linear_key_head_dim", spec.key_head_dim), ("linear_value_head_dim", spec.value_head_dim)):
        if size % LANES or size > MAX_HEAD_DIM:
            raise fields.error(key, f"heads of {size} are no multiple of {LANES} up to {MAX_HEAD_DIM}")
    return spec


def gguf_values(mixer: str, metadata: Fields, arch: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a GGUF file says of layers with states, under the keys of config.json.

    `values` are those of all models.
    """
    if mixer == "short_conv":  # layers without attention have no KV heads
        counts, num_layers = values.get("num_key_value_heads"), metadata.integer(f"{arch}.block_count")
        if not isinstance(counts, list) or len(counts) != num_layers or not any(counts):
            problem = f"must be {num_layers} numbers, not all 0, instead of {shown(counts)}"
            raise metadata.error(f"{arch}.attention.head_count_kv", problem)
        types = [ATTENTION if count else TYPES[mixer] for count in counts]
        return {"layer_types": types, "num_key_value_heads": next(count for count in counts if count)}
    num_heads = metadata.integer(f"{arch}.ssm.time_step_rank")
    inner_size = metadata.integer(f"{arch}.ssm.inner_size")
    if inner_size % num_heads:
        raise metadata.error(f"{arch}.ssm.inner_size", f"{inner_size} is no multiple of the {num_heads} value heads")
    return {"linear_value_head_dim": inner_size // num_heads}
