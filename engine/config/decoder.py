"""What a family of models can differ in, and the layers that its entry and a model's file describe together.

Files of all formats have been translated to the keys of Hugging Face's config.json before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engine.config.fields import Fields, shown
from engine.config.layers import (
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MLPSpec,
    QKNorm,
    RopeSpec,
    RouterSpec,
)
from engine.config.rope import FULL, SLIDING, read_ropes
from engine.config.structs import WeightLayout

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
}

PLAIN_LAYOUT = WeightLayout()

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
    output_bias: Switch = False
    qk_norm: QKNorm = "none"
    has_sinks: bool = False
    scale: str | None = None  # key of the scale of scores, or of the head size it is computed from
    windows: Literal["none", "all", "pattern", "last"] = "none"  # layers with a sliding window, unless layer_types says
    local_theta: str | None = None  # key of the base of rotary embeddings of sliding layers; None: like all others
    no_rope: Literal["none", "full", "listed"] = "none"  # layers without rotary embeddings

    # Norms and residual stream.
    norm: Literal["rms", "layer"] = "rms"
    norms: tuple[str, ...] = ("input_layernorm", "pre_feedforward_layernorm")
    is_parallel: bool = False
    scales_embeddings: bool = False  # by the square root of the hidden size
    logits: Literal["none", "divided", "multiplied"] = "none"  # by logits_scaling, or logit_scale

    # MLP.
    mlp_bias: Switch = False
    activation: str | None = None  # None: hidden_act
    expert_bias: bool = False

    # Checkpoints.
    layout: WeightLayout = PLAIN_LAYOUT  # of safetensors
    gguf_layout: WeightLayout = PLAIN_LAYOUT
    gguf_defaults: Mapping[str, Any] = field(default_factory=dict)  # for keys that GGUF files do not have
    # GGUF files do not say the scale of scores: models with so many layers compute it from hidden size / heads.
    gguf_wide_layers: int | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)  # key -> the one value that is supported, if it is there


class Decoder(NamedTuple):
    """The part of a `ModelConfig` that a family decides."""

    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    embedding_scale: float
    logits_scale: float
    logits_softcap: float | None


def build_decoder(family: Family, fields: Fields) -> Decoder:
    """Return the layers that a file of this family describes. Raises ValueError, which names the file and the key."""
    fields = fields.with_defaults(family.defaults)
    for key, supported in family.refused.items():
        if (value := fields.get(key)) is not None and value != supported:
            raise fields.error(key, f"{shown(value)} is not supported")
    num_layers, hidden_size = fields.integer("num_hidden_layers"), fields.integer("hidden_size")
    types = _layer_types(family, fields, num_layers)
    attention, ropes = _Ropes(family, fields, types), []
    layers: list[LayerSpec] = []
    for index, kind in enumerate(types):
        rope = attention.of_layer(index, kind)
        if rope not in ropes:
            ropes.append(rope)
        layers.append(
            LayerSpec(
                attention=_attention(family, fields, hidden_size, kind == SLIDING, ropes.index(rope)),
                mlp=None if _has_experts(fields, index) else _mlp(family, fields),
                experts=_experts(family, fields) if _has_experts(fields, index) else None,
                is_parallel=family.is_parallel,
                residual_scale=fields.number("residual_multiplier", 1.0),
                **{name: name in family.norms for name in NORMS},
            )
        )
    return Decoder(
        tuple(layers),
        tuple(ropes),
        fields.number("embedding_multiplier", hidden_size**0.5 if family.scales_embeddings else 1.0),
        _logits_scale(family, fields),
        fields.optional_number("final_logit_softcapping", zero=False),
    )


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


def _attention(family: Family, fields: Fields, hidden_size: int, is_sliding: bool, rope: int) -> AttentionSpec:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        problem = f"the {num_heads} attention heads are no multiple of {num_kv_heads} key and value heads"
        raise fields.error("num_key_value_heads", problem)
    size = head_dim(fields)
    scale = size**-0.5
    if family.scale == "attention_multiplier":
        scale = fields.number(family.scale, 1.0, zero=False)
    elif family.scale is not None:
        scale = fields.number(family.scale, size, zero=False) ** -0.5
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        scale=scale,
        rope=rope,
        window=fields.integer("sliding_window") if is_sliding else None,
        softcap=fields.optional_number("attn_logit_softcapping", zero=False),
        qkv_bias=is_on(family.qkv_bias, fields),
        output_bias=is_on(family.output_bias, fields),
        qk_norm=family.qk_norm,
        has_sinks=family.has_sinks,
    )


def _layer_types(family: Family, fields: Fields, num_layers: int) -> list[str]:
    """Return full_attention or sliding_attention for each layer."""
    window = fields.optional_integer("sliding_window", minimum=0)
    if not window or family.windows == "none" or not fields.boolean("use_sliding_window", default=True):
        return [FULL] * num_layers
    types = fields.get("layer_types")
    if types is not None:
        if (
            not isinstance(types, list)
            or len(types) != num_layers
            or any(kind not in (FULL, SLIDING) for kind in types)
        ):
            raise fields.error("layer_types", f"must be {num_layers} times {FULL} or {SLIDING}, not {shown(types)}")
        return types
    if family.windows == "all":
        return [SLIDING] * num_layers
    if family.windows == "last":
        first = fields.integer("max_window_layers", minimum=0)
        return [FULL if index < first else SLIDING for index in range(num_layers)]
    pattern = fields.get("sliding_window_pattern")
    period = len(pattern) if isinstance(pattern, str) else fields.integer("sliding_window_pattern")
    return [SLIDING if (index + 1) % period else FULL for index in range(num_layers)]


class _Ropes:
    """The rotary embedding of each layer."""

    def __init__(self, family: Family, fields: Fields, types: list[str]) -> None:
        size = head_dim(fields)
        self.by_type = read_ropes(fields, size, family.local_theta)
        self.none = RopeSpec(head_dim=size, rotary_dim=0)
        self.has_rope = [True] * len(types)
        if family.no_rope == "full" and SLIDING in types:
            self.has_rope = [kind == SLIDING for kind in types]
        elif family.no_rope == "listed":
            interval = fields.integer("no_rope_layer_interval", 4)
            default = [int((index + 1) % interval != 0) for index in range(len(types))]
            listed = (
                fields.integers("no_rope_layers", len(types), minimum=0) if fields.get("no_rope_layers") else default
            )
            self.has_rope = [bool(one) for one in listed]

    def of_layer(self, index: int, kind: str) -> RopeSpec:
        return self.by_type[kind] if self.has_rope[index] else self.none


def _mlp(family: Family, fields: Fields) -> MLPSpec:
    return MLPSpec(
        intermediate_size=fields.integer("intermediate_size"),
        activation=_activation(family, fields),
        bias=is_on(family.mlp_bias, fields),
    )


def _activation(family: Family, fields: Fields) -> str:
    if family.activation is not None:
        return family.activation
    name = fields.string("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise fields.error("hidden_act", f"{name!r} is not supported (supported: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def _has_experts(fields: Fields, index: int) -> bool:
    if not fields.integer("num_experts", 0, minimum=0) or index < fields.integer("first_k_dense_replace", 0, minimum=0):
        return False
    dense = fields.get("mlp_only_layers") or []
    return index not in dense and (index + 1) % fields.integer("decoder_sparse_step", 1) == 0


def _experts(family: Family, fields: Fields) -> ExpertsSpec:
    num_experts = fields.integer("num_experts")
    shared_size = fields.integer("shared_expert_intermediate_size", 0, minimum=0)
    scoring = fields.string("scoring_func", "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise fields.error("scoring_func", f"{scoring!r} is not supported (supported: softmax, sigmoid)")
    activation = _activation(family, fields)
    return ExpertsSpec(
        router=RouterSpec(
            num_experts=num_experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", maximum=num_experts),
            scoring="sigmoid" if scoring == "sigmoid" else "softmax",
            normalize=fields.boolean("norm_topk_prob"),
            scale=fields.number("routed_scaling_factor", 1.0),
            num_groups=fields.integer("n_group", 1),
            topk_group=fields.integer("topk_group", 1),
        ),
        intermediate_size=fields.integer("moe_intermediate_size", fields.integer("intermediate_size")),
        activation=activation,
        bias=family.expert_bias,
        router_bias=family.expert_bias,
        shared=MLPSpec(intermediate_size=shared_size, activation=activation) if shared_size else None,
    )


def _logits_scale(family: Family, fields: Fields) -> float:
    if family.logits == "divided":
        return 1 / fields.number("logits_scaling", 1.0, zero=False)
    return fields.number("logit_scale", 1.0) if family.logits == "multiplied" else 1.0
