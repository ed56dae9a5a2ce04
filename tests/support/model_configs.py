"""Configurations of models whose layers are all alike, from the numbers of a config.json, and back."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from engine.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, RopeSpec, WeightLayout

# Fields of a model that loads in no time; as in real models, heads need not be as wide as the hidden size.
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "num_token_ids": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
T = TypeVar("T")


def llama_config(*, head_dim: int, is_interleaved: bool = False, **fields: Any) -> ModelConfig:
    """Return the configuration of a Llama.

    `is_interleaved`: as in GGUF files, the rows of queries and keys are stored in pairs.
    """
    attention = AttentionSpec(
        num_heads=fields.pop("num_attention_heads"),
        num_kv_heads=fields.pop("num_key_value_heads"),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=fields.pop("attention_bias", False),
        output_bias=fields.pop("attention_output_bias", False),
    )
    mlp = MLPSpec(intermediate_size=fields.pop("intermediate_size"), bias=fields.pop("mlp_bias", False))
    names = () if is_interleaved else ((r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),)
    return ModelConfig(
        architecture="llama",
        layers=(LayerSpec(attention=attention, mlp=mlp),) * fields.pop("num_hidden_layers"),
        ropes=(RopeSpec(head_dim=head_dim, rotary_dim=head_dim),),
        weight_layout=WeightLayout(names=names, is_interleaved=is_interleaved),
        **fields,
    )


def model_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of a Llama of transformers under the names that the model here has for them."""
    return {name.replace(".post_attention_layernorm.", ".pre_feedforward_layernorm."): x for name, x in tensors.items()}


def llama_fields(config: ModelConfig) -> SimpleNamespace:
    """Return the numbers of a model whose layers are all alike, under the names of config.json and of `ModelConfig`."""
    (layer,) = set(config.layers)
    (rope,) = config.ropes
    attention = config.attentions[0]
    assert layer.mlp is not None
    assert layer.experts is None
    assert (rope.head_dim, rope.rotary_dim) == (attention.head_dim, attention.head_dim)
    return SimpleNamespace(
        **{name: getattr(config, name) for name in config.__struct_fields__ if name not in ("layers", "ropes")},
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=layer.mlp.intermediate_size,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        sliding_window=attention.window,
        attention_bias=attention.qkv_bias,
        attention_output_bias=attention.output_bias,
        mlp_bias=layer.mlp.bias,
    )
