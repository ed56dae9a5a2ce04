"""The families of models: what their decoder layers are made of, and how their checkpoints are written.

A family is one entry of `FAMILIES`. Its fields say where it differs from Llama; where a field holds the name of a key,
the model's own file decides. `build_decoder` turns an entry and a file's fields into layers. Files of all formats have
been translated to the keys of Hugging Face's config.json before.
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

Switch = bool | str  # a fixed value, or the key of a boolean that is false if it is missing


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. Names of norms are those of `LayerSpec`."""

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
    layout: WeightLayout = WeightLayout()  # of safetensors
    gguf_layout: WeightLayout = WeightLayout()
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
        if not isinstance(types, list) or len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types):
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
            listed = fields.integers("no_rope_layers", len(types), minimum=0) if fields.get("no_rope_layers") else default
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


SANDWICH = NORMS  # before and after attention and MLP
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
# Llama calls the norm before the MLP by its place after attention.
LLAMA_NAMES = ((r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),)
LLAMA = WeightLayout(names=LLAMA_NAMES)
GLM_NAMES = (*LLAMA_NAMES, ("post_self_attn_layernorm", "post_attention_layernorm"), ("post_mlp_", "post_feedforward_"))
MIXTRAL_NAMES = (
    *LLAMA_NAMES,
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.w1\.weight", ".gate_proj.weight"),
    (r"\.w2\.weight", ".down_proj.weight"),
    (r"\.w3\.weight", ".up_proj.weight"),
)
INTERLEAVED = WeightLayout(is_interleaved=True)
FUSED_UP = (("mlp.up_proj", "mlp.gate_up_proj"),)  # gate and up are one tensor in GGUF files
GEMMA_DEFAULTS = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        {"max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        layout=LLAMA,
        gguf_layout=INTERLEAVED,
        gguf_defaults={"norm_topk_prob": True},  # Mixtral
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "llama",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
        layout=LLAMA,
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "ministral3",
        "Ministral3ForCausalLM",
        "mistral3",
        {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128},
        windows="all",
        layout=LLAMA,
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "llama",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6, "norm_topk_prob": True}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "norm_eps": 1e-5},
        windows="all",
        layout=WeightLayout(names=MIXTRAL_NAMES),
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
        windows="last",
        layout=LLAMA,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
        | {"head_dim": 128},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        windows="last",
        layout=LLAMA,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        {"max_position_embeddings": 32768, "use_sliding_window": False, "num_key_value_heads": 4}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        layout=LLAMA,
        gguf_defaults={"norm_topk_prob": True},
        refused={"use_sliding_window": False},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        "olmoe",
        {"max_position_embeddings": 4096, "norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="all",
        layout=LLAMA,
        refused={"clip_qkv": None},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        GEMMA_DEFAULTS
        | {"max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_pattern": 2}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"hidden_act": "gelu_pytorch_tanh"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        scale="query_pre_attn_scalar",
        windows="pattern",
        norms=SANDWICH,
        scales_embeddings=True,
        layout=WeightLayout(norm_offset=1.0),
        gguf_wide_layers=46,
        refused={"use_bidirectional_attention": False},
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        GEMMA_DEFAULTS
        | {"max_position_embeddings": 131072, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6}
        | {"query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="head",
        scale="query_pre_attn_scalar",
        windows="pattern",
        local_theta="rope_local_base_freq",
        norms=SANDWICH,
        scales_embeddings=True,
        layout=WeightLayout(norm_offset=1.0),
        gguf_wide_layers=62,
        refused={"use_bidirectional_attention": False},
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss",
        {"max_position_embeddings": 131072, "head_dim": 64, "num_key_value_heads": 8, "num_attention_heads": 64}
        | {"sliding_window": 128, "sliding_window_pattern": 2, "attention_bias": True, "norm_topk_prob": True}
        | {"num_local_experts": 128, "num_experts_per_tok": 4, "rope_theta": 150000.0, "norm_eps": 1e-5},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_sinks=True,
        windows="pattern",
        activation="swigluoai",
        expert_bias=True,
        layout=WeightLayout(names=(*LLAMA_NAMES, (r"\.mlp\.router\.", ".mlp.gate."), (r"\.sinks$", ".sinks.weight")), has_interleaved_experts=True),
        gguf_layout=LLAMA,
        gguf_defaults={"truncate": False},
        refused={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "norm_eps": 1e-5},
        windows="all",
        layout=LLAMA,
        gguf_layout=WeightLayout(names=FUSED_UP),
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "olmo2",
        {"max_position_embeddings": 2048, "norm_eps": 1e-5},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="all",
        norms=POST_NORMS,
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        "olmo2",
        {"max_position_embeddings": 2048, "norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}
        | {"rope_theta": 500000.0},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm="all",
        windows="pattern",
        local_theta="rope_theta",
        norms=POST_NORMS,
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        {"max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        scale="attention_multiplier",
        logits="divided",
        layout=LLAMA,
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "use_sliding_window": False}
        | {"tie_word_embeddings": True, "num_attention_heads": 16},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        no_rope="listed",
        layout=LLAMA,
        gguf_layout=INTERLEAVED,
        refused={"use_sliding_window": False},
    ),
    Family(
        "glm4",
        "Glm4ForCausalLM",
        "glm4",
        {"max_position_embeddings": 131072, "head_dim": 128, "num_key_value_heads": 2, "norm_eps": 1.5625e-7}
        | {"attention_bias": True, "partial_rotary_factor": 0.5},
        qkv_bias="attention_bias",
        norms=SANDWICH,
        layout=WeightLayout(names=GLM_NAMES, is_interleaved=True),
        gguf_layout=WeightLayout(names=FUSED_UP, is_interleaved=True),
    ),
    Family(
        "cohere2",
        "Cohere2ForCausalLM",
        "cohere2",
        {"max_position_embeddings": 8192, "norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
        | {"sliding_window": 4096, "sliding_window_pattern": 4},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        windows="pattern",
        no_rope="full",
        norm="layer",
        norms=("input_layernorm",),
        is_parallel=True,
        logits="multiplied",
        layout=WeightLayout(is_interleaved=True),
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        "exaone4",
        {"max_position_embeddings": 2048, "norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
        qk_norm="head",
        windows="pattern",
        no_rope="full",
        norms=POST_NORMS,
    ),
)


def family_of(model_type: str) -> Family:
    """Return the family of a supported model."""
    return next(family for family in FAMILIES if family.model_type == model_type)
