"""The configuration read from config.json: that of transformers' own config classes, and what families add to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.config import AttentionSpec, ModelConfig, load_model_config
from tests.support.model_configs import llama_fields

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# config.json as transformers 4 wrote it.
CONFIG_JSON: dict[str, Any] = SHAPE | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHORT = {"original_max_position_embeddings": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
COMMON_FIELDS = (*SHAPE, "head_dim", "rms_norm_eps", "tie_word_embeddings", "bos_token_id")


def load(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Load a config.json with changes; a value of ... removes the key."""
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_values(folder, CONFIG_JSON | changes)


def family(folder: Path, model_type: str, **changes: Any) -> ModelConfig:
    """Load a config.json that has little more than sizes."""
    return load_values(folder, SHAPE | {"head_dim": 16, "model_type": model_type} | changes)


def load_values(folder: Path, values: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({key: some for key, some in values.items() if some is not ...}))
    return load_model_config(folder)


@pytest.mark.parametrize("config_class", [transformers.LlamaConfig, transformers.MistralConfig])
def test_missing_keys_have_the_defaults_of_transformers(config_class: Any, tmp_path: Path) -> None:
    shape = {key: SHAPE[key] for key in SHAPE if key not in ("num_key_value_heads", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": config_class.model_type}))
    config, expected = llama_fields(load_model_config(tmp_path)), config_class(**shape)
    for name in COMMON_FIELDS:
        if name != "bos_token_id":  # there is no default for it
            assert getattr(config, name) == getattr(expected, name), name
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.sliding_window == getattr(expected, "sliding_window", None)


def test_code_of_a_supported_model_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = load(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert caplog.messages == [
        f"{tmp_path}: the Python code that comes with the model is not run; its type is supported"
    ]
    assert config == load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_part_of_a_multimodal_model(tied: bool, tmp_path: Path) -> None:
    """Of the outer fields only a few are read, and these win, as in transformers."""
    text = SHAPE | {"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": not tied}
    outer = {"model_type": "gemma3", "hidden_size": 1, "eos_token_id": [3, 4], "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": text}))
    config = load_model_config(tmp_path)
    assert (config.architecture, config.hidden_size, config.eos_token_ids) == ("gemma3_text", 64, (3, 4))
    assert config.tie_word_embeddings == tied
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": text | {"hidden_size": None}}))
    with pytest.raises(ValueError, match=r"config\.json: text_config: hidden_size: is missing"):
        load_model_config(tmp_path)


def test_a_missing_key_has_the_default_of_the_family_and_null_has_not(tmp_path: Path) -> None:
    def attention(**changes: Any) -> AttentionSpec:
        return load(tmp_path, model_type="mistral", **changes).attentions[0]

    assert attention(num_key_value_heads=...).num_kv_heads == transformers.MistralConfig().num_key_value_heads == 8
    assert attention(num_key_value_heads=None, num_attention_heads=16).num_kv_heads == 16
    assert (attention(sliding_window=...).window, attention(sliding_window=None).window) == (4096, None)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    assert load(tmp_path).eos_token_ids == (2,)
    assert load(tmp_path, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8, 2)
    assert load(tmp_path, {"eos_token_id": 2}, eos_token_id=[9, 2]).eos_token_ids == (2, 9)
    assert load(tmp_path, {}, eos_token_id=None).eos_token_ids == ()
    assert load(tmp_path, {"bos_token_id": 5}, bos_token_id=None).bos_token_id == 5


def test_recommended_sampling(tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    assert load(tmp_path).recommended_sampling == {}
    assert load(tmp_path, settings | {"do_sample": True, "max_length": 9}).recommended_sampling == settings
    assert load(tmp_path, {"temperature": 0.6, "top_k": None}).recommended_sampling == {"temperature": 0.6}
    assert load(tmp_path, {"top_k": 0}).recommended_sampling == {"top_k": 0}
    assert load(tmp_path, settings | {"do_sample": False}).recommended_sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None, "architectures": ["GPT2ForCausalLM"]}, "GPT2ForCausalLM.*supported: llama, mistral, "),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "model_type: 'evil' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": [{}]}, "architectures"),
        ({"hidden_size": ...}, "hidden_size: is missing"),
        ({"hidden_size": 65}, "head_dim: is missing, .* .65. is no multiple of the 8 attention heads"),
        ({"head_dim": 7}, "head_dim: 7 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: the 8 attention heads are no multiple of 3"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: must be a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta: must be a number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_parameters: rope_theta: must be"),
        ({"rope_scaling": {"rope_type": "warp", "factor": 4.0}}, "rope_scaling: rope_type: 'warp' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: short_factor: must be 4 positive numbers, not None"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 0]}}, "short_factor: must be 4 positive numb"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1]}}, "short_factor: must be 4 positive numb"),
        ({"rope_scaling": {"type": 1}}, "rope_scaling: type: must be a string, not 1"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: is missing"),
        ({"rope_scaling": ["linear", 2]}, "rope_scaling: must be an object"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor: must be greater"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor: must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false"),
        ({"eos_token_id": 99}, "eos_token_id: must be token ids below 99"),
        ({"bos_token_id": -1}, "bos_token_id: must be token ids"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be an integer from 1 to 1024"),
        (EXPERTS | {"mlp_layer_types": ["sparse"]}, "mlp_layer_types: must be dense or sparse for each layer"),
        (EXPERTS | {"mlp_only_layers": [0] * 1025}, "mlp_only_layers: must be a list of at most 1024 layers"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0} | SHORT},
            "rope_scaling: original_max_.*: must be greater",
        ),
        ({"layer_types": ["full_attention", *["linear_attention"] * 3]}, "layer_types.*linear_attention"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window: must be an integer from 0"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load(tmp_path, **changes)


@pytest.mark.parametrize("generation", [{"do_sample": "yes"}, {"eos_token_id": [1000]}])
def test_generation_config_refused(generation: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: {next(iter(generation))}: must be"):
        load(tmp_path, generation)


@pytest.mark.checklist("B10")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"pickle files \({name}\).*runs whatever code"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert load(tmp_path).num_hidden_layers == 4


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.gguf: no such model"):
        load_model_config(tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model_config(tmp_path)


def test_gemma_3_leaves_out_what_is_default(tmp_path: Path) -> None:
    """The files of Gemma 3 4B hold few keys of the text part."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    values: dict[str, Any] = {"model_type": "gemma3", "text_config": text | {"sliding_window": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_model_config(tmp_path)
    expected: Any = transformers.Gemma3Config(**values).text_config
    attention = config.attentions[0]
    heads = (expected.num_attention_heads, expected.num_key_value_heads, expected.head_dim)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == heads
    assert (config.vocab_size, config.tie_word_embeddings) == (expected.vocab_size, True)


def test_gemma_4_12b(tmp_path: Path) -> None:
    text = SHAPE | {"num_hidden_layers": 6, "num_global_key_value_heads": 1}
    expected: Any = transformers.Gemma4UnifiedConfig(text_config=text)
    expected.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.per_layer_input_size == 0
    assert [attention.head_dim for attention in config.attentions.values()] == [256] * 5 + [512]
    assert [attention.window for attention in config.attentions.values()] == [1024] * 5 + [None]


# What families say of their layers.

SLIDING, DELTA = "sliding_attention", "linear_attention"
MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def windows(config: ModelConfig) -> list[int | None]:
    return [attention.window for attention in config.attentions.values()]


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
    assert windows(family(tmp_path, model_type, **changes)) == expected


LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "n_routed_experts": 8}
SHARED: dict[str, Any] = {
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
        ({"num_kv_shared_layers": 3}, "no layer before number 1 is full_attention"),
        ({"per_layer_config": {"0": {"head_dim": 48}}}, "layer 2 has 2 .* size 16 .* layer 0, which has 2 of size 48"),
        ({"per_layer_config": {"2": {"sliding_window": 99}}}, "layer 2 .* a window of 99, .* layer 0.* window of 9$"),
    ],
)
def test_a_layer_cannot_read_keys_and_values_of_another_shape(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family(tmp_path, "gemma4_text", **SHARED)
    with pytest.raises(ValueError, match=f"config.json: num_kv_shared_layers: {message}"):
        family(tmp_path, "gemma4_text", **SHARED | changes)


def test_a_layer_cannot_choose_whose_keys_and_values_it_reads(tmp_path: Path) -> None:
    own = {"num_kv_shared_layers": 1, "num_hidden_layers": 9, "layer_types": ["full_attention"] * 4}
    config = family(tmp_path, "gemma4_text", **SHARED, per_layer_config={str(index): own for index in range(4)})
    assert [attention.kv_source for attention in config.attentions.values()] == [None, None, 0, 1]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mamba2", {}, "model_type: 'mamba2' is not supported"),
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
        ("qwen3_moe", {**MOE, "scoring_func": "tanh"}, "scoring_func: 'tanh' is not supported"),
        ("qwen3_moe", {**MOE, "num_experts": 1025}, "num_experts: must be an integer from 1 to 1024, not 1025"),
        ("qwen3_moe", {**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok: must be an integer from 1 to 8"),
        ("qwen3_moe", {**MOE, "n_group": 3}, "n_group: 2 of 8 experts cannot be chosen from 1 of 3 groups"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: must be a number above 0"),
        ("granite", {"num_experts": 8}, "num_experts: 8 is not supported"),
        ("llama", {"intermediate_size": [112] * 3}, "intermediate_size: must be 4 integers of at least 1"),
        ("llama", {"intermediate_size": [112, 112, 112, True]}, "intermediate_size: must be 4 integers of at least 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: must be 4 integers"),
        ("deepseek_v2", LATENT | {"kv_lora_rank": 33}, "kv_lora_rank: must be even, not 33"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: True is not supported"),
        ("qwen3_5_text", {"layer_types": [*[DELTA] * 3, "mamba"]}, "layer_types: 'mamba' is .*full_attention, linear_"),
        ("qwen3_5_text", {"layer_types": [DELTA] * 4}, "layer_types: no layer has full_attention"),
        ("qwen3_5_text", {"layer_types": [DELTA, "full_attention"]}, "layer_types: has 2 elements, but there are 4 la"),
        ("qwen3_5_text", {"layer_types": 7}, "layer_types: 7 is not supported"),
        ("qwen3_next", {"full_attention_interval": 5}, "full_attention_interval: must be an integer from 1 to 4"),
        ("qwen3_next", {"linear_conv_kernel_dim": 17}, "linear_conv_kernel_dim: must be an integer from 2 to 16"),
        ("qwen3_next", {"linear_num_value_heads": 2**31}, "linear_num_value_heads: must be an integer"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "linear_num_value_heads: 32 value heads are no multiple of 3"),
        ("qwen3_next", {"linear_key_head_dim": 272}, "linear_key_head_dim: heads of 272 are no multiple of 16 up to"),
        ("lfm2", {"full_attn_idxs": ["1"]}, "full_attn_idxs: must be numbers of layers"),
        ("lfm2", {"full_attn_idxs": [1], "conv_L_cache": 1}, "conv_L_cache: must be an integer from 2 to 16, not 1"),
        ("lfm2", {"full_attn_idxs": [1], "block_ffn_dim_multiplier": 1e30}, "intermediate_size: must be an integer"),
        ("lfm2", {"full_attn_idxs": [1], "block_multiple_of": 0}, "block_multiple_of: must be an integer"),
    ],
)
def test_families_refused(model_type: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        family(tmp_path, model_type, **changes)


def test_sizes_of_single_layers(tmp_path: Path) -> None:
    config = family(tmp_path, "llama", intermediate_size=[8, 16, 24, 32], num_key_value_heads=[1, 2, 4, 8])
    assert [layer.mlp.intermediate_size for layer in config.layers if layer.mlp] == [8, 16, 24, 32]
    assert [attention.num_kv_heads for attention in config.attentions.values()] == [1, 2, 4, 8]
