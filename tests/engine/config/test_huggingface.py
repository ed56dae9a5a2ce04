"""The configuration read from config.json, compared with that of transformers' own config classes."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma3Config,
    Gemma4UnifiedConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
)

from engine.config import AttentionSpec, ModelConfig, RopeScaling, load_model_config
from tests.support.model_configs import llama_fields

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
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
    config = {key: value for key, value in (CONFIG_JSON | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(folder)


def test_as_transformers_writes_it(tmp_path: Path) -> None:
    rope = LLAMA3 | {"rope_theta": 1234.5, "original_max_position_embeddings": 256}
    changes: dict[str, Any] = dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), True)
    changes |= {"head_dim": 24, "rms_norm_eps": 1e-3, "hidden_act": "gelu", "rope_parameters": rope}
    expected: Any = LlamaConfig(**SHAPE, **changes)
    expected.save_pretrained(tmp_path)
    config = llama_fields(load_model_config(tmp_path))
    for name in (*COMMON_FIELDS, "attention_bias", "mlp_bias", "hidden_act"):
        assert getattr(config, name) == getattr(expected, name), name
    assert config.attention_output_bias
    assert config.rope_theta == 1234.5
    assert {name: getattr(config.rope_scaling, name) for name in LLAMA3} == LLAMA3
    assert (config.rope_scaling.original_max_position_embeddings, config.sliding_window) == (256, None)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
def test_missing_keys_have_the_defaults_of_transformers(config_class: Any, tmp_path: Path) -> None:
    shape = {key: SHAPE[key] for key in SHAPE if key not in ("num_key_value_heads", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": config_class.model_type}))
    config, expected = llama_fields(load_model_config(tmp_path)), config_class(**shape)
    for name in COMMON_FIELDS:
        if name != "bos_token_id":  # there is no default for it
            assert getattr(config, name) == getattr(expected, name), name
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.sliding_window == getattr(expected, "sliding_window", None)


def test_older_files(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    config = llama_fields(load(tmp_path, rope_scaling=scaling, head_dim=None, num_key_value_heads=...))
    assert (config.rope_theta, config.rope_scaling) == (500000.0, RopeScaling(rope_type="linear", factor=4.0))
    assert (config.head_dim, config.num_key_value_heads) == (8, 8)


def test_partial_rotary_embeddings(tmp_path: Path) -> None:
    (rope,) = load(tmp_path, partial_rotary_factor=0.5).ropes
    assert (rope.head_dim, rope.rotary_dim) == (8, 4)


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
        return load(tmp_path, model_type="mistral", **changes).layers[0].attention

    assert attention(num_key_value_heads=...).num_kv_heads == MistralConfig().num_key_value_heads == 8
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


def test_generation_config_as_transformers_writes_it(tmp_path: Path) -> None:
    generation: Any = GenerationConfig
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.1}
    generation(do_sample=True, eos_token_id=[4, 5], **fields).save_pretrained(tmp_path)
    config = load(tmp_path)
    assert config.recommended_sampling == fields
    assert config.eos_token_ids == (4, 5, 2)


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
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types.*linear_attention"),
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
    assert load(tmp_path).num_hidden_layers == 3


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
    expected: Any = Gemma3Config(**values).text_config
    attention = config.layers[0].attention
    heads = (expected.num_attention_heads, expected.num_key_value_heads, expected.head_dim)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == heads
    assert (config.vocab_size, config.tie_word_embeddings) == (expected.vocab_size, True)


def test_gemma_4_12b(tmp_path: Path) -> None:
    expected: Any = Gemma4UnifiedConfig(text_config=SHAPE | {"num_hidden_layers": 6, "num_global_key_value_heads": 1})
    expected.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.per_layer_input_size == 0
    assert [layer.attention.head_dim for layer in config.layers] == [256] * 5 + [512]
    assert [layer.attention.window for layer in config.layers] == [1024] * 5 + [None]
