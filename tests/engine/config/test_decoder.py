"""What config.json files of families say of their layers, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig, load_model_config

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SLIDING = "sliding_attention"
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def load(folder: Path, model_type: str, **changes: Any) -> ModelConfig:
    """Load a config.json of a family; a value of ... removes the key."""
    values = {key: value for key, value in (SHAPE | {"model_type": model_type} | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return load_model_config(folder)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.attention.window for layer in config.layers]


def thetas(config: ModelConfig) -> list[float]:
    """Return the base of each layer; 0 if it rotates nothing."""
    ropes = [config.ropes[layer.attention.rope] for layer in config.layers]
    return [rope.theta if rope.rotary_dim else 0.0 for rope in ropes]


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {"sliding_window": 9}, [None] * 4),
        ("mistral", {"sliding_window": 0}, [None] * 4),
        ("qwen2", {"sliding_window": 9}, [None] * 4),  # use_sliding_window is false
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 9]),
        ("gemma2", {"sliding_window": 9}, [9, None, 9, None]),
        ("gemma3_text", {"sliding_window": 9, "sliding_window_pattern": 3}, [9, 9, None, 9]),
        ("gemma2", {"sliding_window": 9, "layer_types": [*["full_attention"] * 3, SLIDING]}, [None, None, None, 9]),
    ],
)
def test_windows(model_type: str, changes: dict[str, Any], expected: list[int | None], tmp_path: Path) -> None:
    assert windows(load(tmp_path, model_type, **changes)) == expected


def test_bases_of_rotary_embeddings(tmp_path: Path) -> None:
    gemma3 = load(tmp_path, "gemma3_text", sliding_window_pattern=2, rope_theta=7e5, rope_local_base_freq=500.0)
    assert thetas(gemma3) == [500.0, 7e5, 500.0, 7e5]
    scaled = load(tmp_path, "gemma3_text", sliding_window_pattern=2, rope_scaling={"type": "linear", "factor": 8.0})
    assert [rope.scaling.factor for rope in scaled.ropes] == [1.0, 8.0]  # only layers that see everything
    assert thetas(load(tmp_path, "cohere2", sliding_window_pattern=2, rope_theta=5.0)) == [5.0, 0.0, 5.0, 0.0]
    assert thetas(load(tmp_path, "smollm3", rope_theta=5.0, no_rope_layers=[1, 0, 0, 1])) == [5.0, 0.0, 0.0, 5.0]
    assert thetas(load(tmp_path, "smollm3", rope_theta=5.0, no_rope_layer_interval=2)) == [5.0, 0.0, 5.0, 0.0]


def test_norms(tmp_path: Path) -> None:
    def norms(model_type: str) -> list[bool]:
        layer = load(tmp_path, model_type).layers[0]
        before = [layer.input_layernorm, layer.pre_feedforward_layernorm]
        return [*before, layer.post_attention_layernorm, layer.post_feedforward_layernorm]

    assert norms("llama") == [True, True, False, False]
    assert norms("olmo2") == [False, False, True, True]
    assert norms("gemma2") == [True, True, True, True]
    assert norms("cohere2") == [True, False, False, False]


def test_scales(tmp_path: Path) -> None:
    gemma2 = load(tmp_path, "gemma2", query_pre_attn_scalar=100)
    assert (gemma2.embedding_scale, gemma2.layers[0].attention.scale) == (8.0, 0.1)
    assert (gemma2.logits_softcap, gemma2.layers[0].attention.softcap) == (30.0, 50.0)
    assert load(tmp_path, "gemma2", final_logit_softcapping=None).logits_softcap is None
    multipliers = {"attention_multiplier": 0.5, "residual_multiplier": 0.25, "embedding_multiplier": 12.0}
    granite = load(tmp_path, "granite", logits_scaling=4.0, **multipliers)
    assert (granite.embedding_scale, granite.logits_scale) == (12.0, 0.25)
    assert (granite.layers[0].attention.scale, granite.layers[0].residual_scale) == (0.5, 0.25)
    assert load(tmp_path, "cohere2", logit_scale=0.5).logits_scale == 0.5
    assert load(tmp_path, "llama").layers[0].attention.scale == 0.25


def test_experts(tmp_path: Path) -> None:
    moe = load(tmp_path, "qwen3_moe", **EXPERTS, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.experts is not None for layer in moe.layers] == [False, True, False, False]
    assert [layer.mlp is None for layer in moe.layers] == [False, True, False, False]
    experts = moe.layers[1].experts
    assert experts is not None
    assert (experts.router.num_experts, experts.router.num_experts_per_tok, experts.intermediate_size) == (8, 2, 40)
    assert (experts.router.normalize, experts.router.scoring, experts.shared) == (True, "softmax", None)
    other = load(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=3)  # under its other name
    assert [layer.experts.router.num_experts for layer in other.layers if layer.experts is not None] == [4] * 4


def test_shared_keys_and_values(tmp_path: Path) -> None:
    """The last layers read those of the last layer of their type that has its own."""
    types = [SLIDING, "full_attention", SLIDING, SLIDING, "full_attention"]
    shared = {"layer_types": types, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "global_head_dim": 32}
    config = load(tmp_path, "gemma4_text", **shared, use_double_wide_mlp=True)
    assert [layer.attention.kv_source for layer in config.layers] == [None, None, None, 2, 1]
    assert [layer.attention.head_dim for layer in config.layers] == [16, 32, 16, 16, 32]
    assert [layer.mlp.intermediate_size for layer in config.layers if layer.mlp] == [112, 112, 112, 224, 224]
    with pytest.raises(ValueError, match="num_kv_shared_layers: no layer before number 1 is full_attention"):
        load(tmp_path, "gemma4_text", **shared | {"num_kv_shared_layers": 4})


SHARED = {
    "layer_types": [SLIDING, "full_attention", SLIDING, "full_attention"],
    "num_kv_shared_layers": 2,
    "sliding_window": 9,
    "global_head_dim": None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_key_value_heads": [1, 1, 1, 8]},
            "layer 3 has 8 key and value heads of size 16 and no window, but reads those of layer 1, which has 1 of ",
        ),
        ({"per_layer_config": {"0": {"head_dim": 48}}}, "layer 2 has 2 .* size 16 .* layer 0, which has 2 of size 48"),
        ({"per_layer_config": {"2": {"sliding_window": 99}}}, "layer 2 .* a window of 99, .* layer 0.* window of 9$"),
    ],
)
def test_a_layer_cannot_read_keys_and_values_of_another_shape(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    load(tmp_path, "gemma4_text", **SHARED)
    with pytest.raises(ValueError, match=f"config.json: num_kv_shared_layers: {message}"):
        load(tmp_path, "gemma4_text", **SHARED | changes)


def test_a_layer_cannot_choose_whose_keys_and_values_it_reads(tmp_path: Path) -> None:
    own = {"num_kv_shared_layers": 1, "num_hidden_layers": 9, "layer_types": ["full_attention"] * 4}
    config = load(tmp_path, "gemma4_text", **SHARED, per_layer_config={str(index): own for index in range(4)})
    assert [layer.attention.kv_source for layer in config.layers] == [None, None, 0, 1]


def test_latent_attention(tmp_path: Path) -> None:
    sizes = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 2}
    config = load(tmp_path, "deepseek_v2", **sizes, **experts, first_k_dense_replace=1, topk_method="greedy")
    attention = config.layers[0].attention
    assert (attention.num_kv_heads, attention.head_dim, attention.values_are_keys) == (1, 40, True)
    assert attention.scale == 32**-0.5
    assert [layer.experts is None for layer in config.layers] == [True, False, False, False]
    assert config.layers[1].experts is not None
    assert config.layers[1].experts.shared is not None
    assert config.layers[1].experts.shared.intermediate_size == 80
    with pytest.raises(ValueError, match="kv_lora_rank: must be even, not 33"):
        load(tmp_path, "deepseek_v2", **sizes | {"kv_lora_rank": 33}, **experts)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_next", {}, "model_type: 'qwen3_next' is not supported"),
        ("gemma3_text", {"layer_types": ["linear_attention"] * 4}, "layer_types: .*'linear_attention'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types: has 1 elements, but there are 4 layers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0 is not supported"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention: 'all' is not supported"),
        ("llama", {"is_causal": False}, "is_causal: False is not supported"),
        ("gemma4_text", {"vocab_size_per_layer_input": 98}, "vocab_size_per_layer_input: 98 is less than the 99 of"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit: 5.0 is not supported"),
        ("llama", {"hidden_act": "relu"}, r"hidden_act: 'relu' is not supported \(supported: silu, swish, gelu"),
        (
            "gemma3_text",
            {"sliding_window_pattern": 2, "rope_parameters": {"full_attention": {"rope_type": "warp"}, SLIDING: {}}},
            "rope_parameters: full_attention: rope_type: 'warp' is not supported",
        ),
        (
            "glm4_moe_lite",
            {"n_routed_experts": 8, "n_group": 8, "topk_group": 4, "v_head_dim": 16, "first_k_dense_replace": 0},
            "n_group: 8 groups have one expert each",  # groups are compared by their two best experts
        ),
        ("qwen3_moe", {**EXPERTS, "scoring_func": "tanh"}, "scoring_func: 'tanh' is not supported"),
        ("qwen3_moe", {**EXPERTS, "num_experts": 1025}, "num_experts: must be an integer from 1 to 1024, not 1025"),
        ("qwen3_moe", {**EXPERTS, "num_experts_per_tok": 9}, "num_experts_per_tok: must be an integer from 1 to 8"),
        ("qwen3_moe", {**EXPERTS, "n_group": 3}, "n_group: 2 of 8 experts cannot be chosen from 1 of 3 groups"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: must be a number above 0"),
        ("granite", {"num_experts": 8}, "num_experts: 8 is not supported"),
        ("llama", {"intermediate_size": [112] * 3}, "intermediate_size: must be 4 integers of at least 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: must be 4 integers"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: True is not supported"),
    ],
)
def test_refused(model_type: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load(tmp_path, model_type, **changes)


def test_sizes_of_single_layers(tmp_path: Path) -> None:
    config = load(tmp_path, "llama", intermediate_size=[8, 16, 24, 32], num_key_value_heads=[1, 2, 4, 8])
    assert [layer.mlp.intermediate_size for layer in config.layers if layer.mlp] == [8, 16, 24, 32]
    assert [layer.attention.num_kv_heads for layer in config.layers] == [1, 2, 4, 8]
