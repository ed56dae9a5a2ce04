"""What a family of models can differ in, and the layers that its entry and a model's file describe together.

Files of all formats have been translated to the keys of Hugging Face's config.json before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from engine.config.fields import Fields, shown
from engine.config.layers import (
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    MLPSpec,
    QKNorm,
    RopeSpec,
    RouterSpec,
)
from engine.config.rope import FULL, SLIDING, read_layer_rope, rope_fields, yarn_mscale
from engine.config.structs import WeightLayout
from engine.shared.parts import engine_part

ACTIVATIONS = {  # name in config.json -> name of the activation in `Kernels.act_and_mul`
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}

# Key -> other names that config.json files have for it.
NAMES: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("top_k_experts",),
    "hidden_act": ("hidden_activation",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps"),
    "shared_expert_intermediate_size": ("shared_intermediate_size",),
}

# Key -> the one value that is supported, if it is there. Encoders and embedding models have the other.
REFUSED: Mapping[str, Any] = {"is_causal": True, "use_bidirectional_attention": False}

MAX_EXPERTS = 1024  # more the kernels do not support
MAX_LAYERS = 1024  # more are a damaged file
MIXER = "mixer"  # the type of layers without attention
PLAIN_LAYOUT = WeightLayout()
# Llama calls the norm before the MLP by its place after attention.
LLAMA_NAMES = ((r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),)
LLAMA_LAYOUT = WeightLayout(names=LLAMA_NAMES)

Switch = bool | str  # a fixed value, or the key of a boolean that is false if it is missing


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. Where a field holds the name of a key, the model's file decides.

    Names of norms are those of `LayerSpec`.
    """

    model_type: str  # in config.json
    architecture: str  # in the list `architectures` of config.json
    gguf: str | None = None  # `general.architecture` of its GGUF files; None: there are none
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of its config class, for keys that are left out

    # Attention.
    qkv_bias: Switch = False
    output_bias: Switch | None = None  # None: as qkv_bias
    qk_norm: QKNorm = "none"
    v_norm: bool = False
    has_sinks: bool = False
    scale: str | float | None = None  # of scores, or its key, or the key of the head size it is computed from
    windows: Literal["none", "all", "pattern", "last"] = "none"  # layers with a sliding window, unless layer_types says
    ends_with_full: bool = False  # the last layer has no window, whatever layer_types says
    local_theta: str | None = None  # key of the base of rotary embeddings of sliding layers; None: like all others
    rope_names: Mapping[str, str] = field(default_factory=dict)  # other names of types of scaling
    # Layers without rotary embeddings. "full": those without a window; "mixed": the same, if the file has a window.
    no_rope: Literal["none", "full", "mixed", "listed", "flagged"] = "none"
    is_latent: bool = False
    has_gate: bool = False

    # What layers of other types than attention have, which their config class names.
    mixer: Literal["none", "gated_delta_net", "short_conv"] = "none"

    # Norms and residual stream.
    norm: Literal["rms", "layer"] = "rms"
    norms: tuple[str, ...] = ("input_layernorm", "pre_feedforward_layernorm")
    is_parallel: bool = False
    scales_embeddings: bool = False  # by the square root of the hidden size
    logits: Literal["none", "divided", "multiplied"] = "none"  # by logits_scaling, or logit_scale

    # MLP.
    mlp_size: str = "intermediate_size"  # key
    mlp_bias: Switch = False
    activation: str | None = None  # None: hidden_act
    expert_bias: bool = False
    correction_bias: bool = False
    has_shared_gate: bool = False
    group_score: Literal["max", "top2"] = "max"
    has_parallel_experts: bool = False  # beside the MLP, with a norm of the router and scales of experts (Gemma 4)
    has_layer_scalars: bool = False

    # Checkpoints.
    layout: WeightLayout = LLAMA_LAYOUT  # of safetensors
    gguf_layout: WeightLayout = PLAIN_LAYOUT
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)  # for keys that GGUF files do not have
    # GGUF files do not say the scale of scores: models with so many layers compute it from hidden size / heads.
    gguf_wide_layers: int | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)  # as REFUSED


def build_decoder(family: Family, fields: Fields) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` that a file of this family describes, whatever its format.

    Raises ValueError, which names the file and the key.
    """
    fields = fields.with_defaults(family.defaults)
    for key, supported in {**REFUSED, **family.refused}.items():
        if (value := fields.get(key)) is not None and value != supported:
            raise fields.error(key, f"{shown(value)} is not supported")
    num_layers, hidden_size = fields.integer("num_hidden_layers", maximum=MAX_LAYERS), fields.integer("hidden_size")
    if family.mixer != "none":
        fields = engine_part("hybrid", "config").complete(family.mixer, fields)
    types = _layer_types(family, fields, num_layers)
    if family.ends_with_full:
        types[-1] = FULL
    has_rope, sources = _layers_with_rope(family, fields, types), _kv_sources(fields, types)
    ropes: list[RopeSpec] = []
    layers: list[LayerSpec] = []
    for index, kind in enumerate(types):
        layer_fields = _layer_fields(fields, index, kind)
        rope = _rope(family, layer_fields, kind) if has_rope[index] else _no_rope(layer_fields)
        if rope not in ropes:
            ropes.append(rope)
        is_mixer = kind == MIXER
        has_experts = _has_experts(fields, index)
        has_both = has_experts and family.has_parallel_experts
        norms = set(family.norms) - ({"pre_feedforward_layernorm"} if has_both else set())
        layers.append(
            LayerSpec(
                attention=None
                if is_mixer
                else _attention(family, layer_fields, kind, ropes.index(rope), sources[index]),
                mixer=engine_part("hybrid", "config").read_mixer(family.mixer, layer_fields) if is_mixer else None,
                mlp=_mlp(family, layer_fields) if family.has_parallel_experts or not has_experts else None,
                experts=_experts(family, layer_fields) if has_experts else None,
                is_parallel=family.is_parallel,
                residual_scale=fields.number("residual_multiplier", 1.0),
                has_layer_scalar=family.has_layer_scalars,
                **{name: name in norms for name in NORMS},
            )
        )
    _check_kv_sources(fields, layers)
    return {
        "architecture": family.model_type,
        "hidden_size": hidden_size,
        "layers": tuple(layers),
        "ropes": tuple(ropes),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "norm": family.norm,
        "embedding_scale": fields.number("embedding_multiplier", hidden_size**0.5 if family.scales_embeddings else 1.0),
        "per_layer_input_size": fields.integer("hidden_size_per_layer_input", 0, minimum=0),
        "logits_scale": _logits_scale(family, fields),
        "logits_softcap": fields.optional_number("final_logit_softcapping", zero=False),
        "num_ignored_layers": fields.integer("num_nextn_predict_layers", 0, minimum=0),
    }


NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def is_on(switch: Switch, fields: Fields) -> bool:
    return fields.boolean(switch) if isinstance(switch, str) else switch


def head_dim(fields: Fields) -> int:
    """Return the head size, or else the hidden size divided by the number of heads. Raises ValueError if it is odd."""
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    size = fields.optional_integer("head_dim")
    if size is None and hidden_size % num_heads:
        problem = f"is missing, and the hidden size ({hidden_size}) is no multiple of the {num_heads} attention heads"
        raise fields.error("head_dim", problem)
    size = size or hidden_size // num_heads
    if size % 2:
        raise fields.error("head_dim", f"{size} must be even, for rotary embeddings")
    return size


def _layer_fields(fields: Fields, index: int, kind: str) -> Fields:
    """Return the fields of the file with what they say of one layer in place of what they say of all.

    A list has an element for each layer. Some families have sizes by type of layer: heads of global layers, heads of
    sliding ones in GGUF files, and a wider MLP where a layer reads the keys and values of another (Gemma 4).
    `per_layer_config` comes last: the fields of single layers, by their numbers.
    """
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    num_layers = fields.integer("num_hidden_layers")
    values = {key: fields.integers(key, num_layers)[index] for key in keys if isinstance(fields.get(key), list)}
    if kind == FULL and "per_layer_config" not in fields:  # which replaces the keys of all global layers
        values |= _global_sizes(fields)
    if kind == SLIDING and fields.get("sliding_head_dim") is not None:  # of GGUF files, whose usual size is the global
        values["head_dim"] = fields.integer("sliding_head_dim")
        values["rotary_dim"] = fields.integer("sliding_rotary_dim")
    if index >= _first_shared_layer(fields) and fields.boolean("use_double_wide_mlp"):
        values["intermediate_size"] = 2 * fields.integer("intermediate_size")
    by_layer = fields.nested("per_layer_config")
    own = by_layer.nested(str(index)) if by_layer is not None else None
    return fields.with_values(values | dict(own.values if own is not None else {}))


def _global_sizes(fields: Fields) -> dict[str, int]:
    """Return the sizes of layers of full attention that differ from those of the others."""
    keys = {"head_dim": "global_head_dim"}
    if fields.boolean("attention_k_eq_v"):
        keys["num_key_value_heads"] = "num_global_key_value_heads"
    sizes = {key: fields.optional_integer(name) for key, name in keys.items()}
    return {key: size for key, size in sizes.items() if size is not None}


def _first_shared_layer(fields: Fields) -> int:
    """Return the number of layers with keys and values of their own; the others come last."""
    num_layers = fields.integer("num_hidden_layers")
    return num_layers - fields.integer("num_kv_shared_layers", 0, minimum=0, maximum=num_layers - 1)


def _kv_sources(fields: Fields, types: list[str]) -> list[int | None]:
    """Return for each layer the one whose keys and values it reads: the last of its type with its own; None: its own.

    `fields` are those of the whole model, so that no layer can say otherwise for itself.
    """
    first_shared = _first_shared_layer(fields)
    last_of_type = {kind: index for index, kind in enumerate(types[:first_shared])}
    if missing := [kind for kind in types[first_shared:] if kind not in last_of_type]:
        raise fields.error("num_kv_shared_layers", f"no layer before number {first_shared} is {missing[0]}")
    return [None] * first_shared + [last_of_type[kind] for kind in types[first_shared:]]


def _check_kv_sources(fields: Fields, layers: list[LayerSpec]) -> None:
    """Check that layers find keys and values of their own shape and window where they read those of another."""
    for index, layer in enumerate(layers):
        if layer.attention is None or (source := layer.attention.kv_source) is None:
            continue
        own, other = ((spec.kv_shape, spec.window) for spec in (layer.attention, layers[source].attention) if spec)
        if own != other:
            (shape, window), (shape_there, window_there) = own, other
            problem = (
                f"layer {index} has {shape.num_kv_heads} key and value heads of size {shape.head_dim} and "
                f"{_shown_window(window)}, but reads those of layer {source}, which has {shape_there.num_kv_heads} of "
                f"size {shape_there.head_dim} and {_shown_window(window_there)}"
            )
            raise fields.error("num_kv_shared_layers", problem)


def _shown_window(window: int | None) -> str:
    return "no window" if window is None else f"a window of {window}"


def _attention(family: Family, fields: Fields, kind: str, rope: int, source: int | None) -> AttentionSpec:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        problem = f"the {num_heads} attention heads are no multiple of {num_kv_heads} key and value heads"
        raise fields.error("num_key_value_heads", problem)
    if family.is_latent:
        return _latent_attention(fields, num_heads, rope)
    size = head_dim(fields)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        scale=_score_scale(family, fields, size),
        rope=rope,
        window=fields.integer("sliding_window") if kind == SLIDING else None,
        softcap=fields.optional_number("attn_logit_softcapping", zero=False),
        qkv_bias=is_on(family.qkv_bias, fields),
        output_bias=is_on(family.qkv_bias if family.output_bias is None else family.output_bias, fields),
        qk_norm=family.qk_norm,
        v_norm=family.v_norm,
        has_sinks=family.has_sinks,
        has_gate=family.has_gate,
        values_are_keys=kind == FULL and fields.boolean("attention_k_eq_v"),
        kv_source=source,
    )


def _latent_attention(fields: Fields, num_heads: int, rope: int) -> AttentionSpec:
    latent = LatentSpec(
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_head_dim=fields.integer("qk_nope_head_dim"),
        rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    if latent.kv_lora_rank % 2:
        raise fields.error("kv_lora_rank", f"must be even, not {latent.kv_lora_rank}")
    scale = (latent.nope_head_dim + latent.rope_head_dim) ** -0.5
    scaling = rope_fields(fields)
    if scaling is not None and scaling.string("rope_type", scaling.string("type", "default")) == "yarn":
        scale *= yarn_mscale(scaling.number("factor", 1.0), scaling.number("mscale_all_dim", 0.0)) ** 2
    size = latent.kv_lora_rank + latent.rope_head_dim
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=1, head_dim=size, scale=scale, rope=rope, values_are_keys=True, latent=latent
    )


def _score_scale(family: Family, fields: Fields, size: int) -> float:
    if isinstance(family.scale, float):
        return family.scale
    if family.scale == "attention_multiplier":
        return fields.number(family.scale, 1.0, zero=False)
    of_size = fields.number(family.scale, size, zero=False) if family.scale else float(size)
    return 1 / math.sqrt(of_size)


def _layer_types(family: Family, fields: Fields, num_layers: int) -> list[str]:
    """Return full_attention, sliding_attention or mixer for each layer."""
    types = fields.get("layer_types") or []
    known = (FULL, SLIDING) if family.mixer == "none" else (FULL, MIXER)
    if not isinstance(types, list) or any(kind not in (*known, "attention") for kind in types):
        raise fields.error("layer_types", f"must be {known[0]} or {known[1]}, not {shown(types)}")
    if types and len(types) != num_layers:
        raise fields.error("layer_types", f"has {len(types)} elements, but there are {num_layers} layers")
    if family.mixer != "none":
        return [kind if kind == MIXER else FULL for kind in types]
    window = fields.optional_integer("sliding_window", minimum=0)
    is_off = family.windows == "last" and not fields.boolean("use_sliding_window", default=True)
    if not window or family.windows == "none" or is_off:
        return [FULL] * num_layers
    if types:
        return [SLIDING if kind == SLIDING else FULL for kind in types]
    if family.windows == "all":
        return [SLIDING] * num_layers
    if family.windows == "last":
        first = fields.integer("max_window_layers", minimum=0)
        return [FULL if index < first else SLIDING for index in range(num_layers)]
    pattern = fields.get("sliding_window_pattern")
    period = len(pattern) if pattern and isinstance(pattern, str) else fields.integer("sliding_window_pattern")
    return [SLIDING if (index + 1) % period else FULL for index in range(num_layers)]


def _layers_with_rope(family: Family, fields: Fields, types: list[str]) -> list[bool]:
    if family.no_rope == "full" or (family.no_rope == "mixed" and fields.optional_integer("sliding_window", minimum=0)):
        return [kind == SLIDING for kind in types]
    if family.no_rope == "flagged":
        return [fields.get("position_embedding_type") == "rope"] * len(types)
    if family.no_rope in ("none", "mixed"):
        return [True] * len(types)
    if fields.get("no_rope_layers"):
        return [bool(has_rope) for has_rope in fields.integers("no_rope_layers", len(types), minimum=0)]
    interval = fields.integer("no_rope_layer_interval", 4)
    return [(index + 1) % interval != 0 for index in range(len(types))]


def _rope(family: Family, fields: Fields, kind: str) -> RopeSpec:
    if family.is_latent:
        rank, size = fields.integer("kv_lora_rank"), fields.integer("qk_rope_head_dim")
        rope = read_layer_rope(fields, kind, size, None, family.rope_names)
        return msgspec.structs.replace(rope, head_dim=rank + size, first_pair=rank // 2)
    return read_layer_rope(fields, kind, head_dim(fields), family.local_theta, family.rope_names)


def _no_rope(fields: Fields) -> RopeSpec:
    return RopeSpec(head_dim=head_dim(fields), rotary_dim=0)


def _mlp(family: Family, fields: Fields) -> MLPSpec:
    return MLPSpec(
        intermediate_size=fields.integer(family.mlp_size),
        activation=_activation(family, fields),
        bias=is_on(family.mlp_bias, fields),
    )


def _activation(family: Family, fields: Fields) -> str:
    if family.activation is not None:
        return family.activation
    name = fields.string("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise fields.error("hidden_act", f"{shown(name)} is not supported (supported: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def _has_experts(fields: Fields, index: int) -> bool:
    if not fields.integer("num_experts", 0, minimum=0) or not fields.boolean("enable_moe_block", default=True):
        return False
    if types := fields.get("mlp_layer_types"):
        num_layers = fields.integer("num_hidden_layers")
        if not isinstance(types, list) or len(types) != num_layers or not all(x in ("dense", "sparse") for x in types):
            raise fields.error("mlp_layer_types", f"must be dense or sparse for each layer, not {shown(types)}")
        return bool(types[index] == "sparse")
    if index < fields.integer("first_k_dense_replace", 0, minimum=0):
        return False
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or len(dense) > MAX_LAYERS:
        raise fields.error("mlp_only_layers", f"must be a list of at most {MAX_LAYERS} layers, not {shown(dense)}")
    return index not in dense and (index + 1) % fields.integer("decoder_sparse_step", 1) == 0


def _experts(family: Family, fields: Fields) -> ExpertsSpec:
    num_experts = fields.integer("num_experts", maximum=MAX_EXPERTS)
    size = fields.integer("moe_intermediate_size", fields.integer("intermediate_size"))
    num_shared = fields.integer("n_shared_experts", 0, minimum=0)
    shared_size = fields.integer("shared_expert_intermediate_size", num_shared * size, minimum=0)
    scoring = fields.string("scoring_func", "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise fields.error("scoring_func", f"{shown(scoring)} is not supported (supported: softmax, sigmoid)")
    num_chosen = fields.integer("num_experts_per_tok", maximum=num_experts)
    has_groups = fields.string("topk_method", "") != "greedy"
    num_groups, topk_group = (fields.integer(key, 1) if has_groups else 1 for key in ("n_group", "topk_group"))
    if num_experts % num_groups or not num_chosen <= topk_group * (num_experts // num_groups) <= num_experts:
        problem = f"{num_chosen} of {num_experts} experts cannot be chosen from {topk_group} of {num_groups} groups"
        raise fields.error("n_group", problem)
    if num_groups > 1 and family.group_score == "top2" and num_groups == num_experts:
        raise fields.error("n_group", f"{num_groups} groups have one expert each, but two are compared")
    activation = _activation(family, fields)
    return ExpertsSpec(
        router=RouterSpec(
            num_experts=num_experts,
            num_experts_per_tok=num_chosen,
            scoring="sigmoid" if scoring == "sigmoid" else "softmax",
            normalize=fields.boolean("norm_topk_prob"),
            scale=fields.number("routed_scaling_factor", 1.0),
            num_groups=num_groups,
            topk_group=topk_group,
            group_score=family.group_score,
        ),
        intermediate_size=size,
        activation=activation,
        bias=family.expert_bias,
        router_bias=family.expert_bias,
        correction_bias=family.correction_bias,
        expert_scales=family.has_parallel_experts,
        shared=MLPSpec(intermediate_size=shared_size, activation=activation) if shared_size else None,
        shared_gate=family.has_shared_gate and shared_size > 0,
    )


def _logits_scale(family: Family, fields: Fields) -> float:
    if family.logits == "divided":
        return 1 / fields.number("logits_scaling", 1.0, zero=False)
    return fields.number("logit_scale", 1.0) if family.logits == "multiplied" else 1.0
