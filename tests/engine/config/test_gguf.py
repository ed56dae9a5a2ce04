"""The configuration read from the metadata of GGUF files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.config import ModelConfig, RopeScaling, load_model_config
from tests.support.gguf_files import LLAMA, write_gguf
from tests.support.model_configs import llama_fields


def gguf_config(path: Path, metadata: dict[str, Any] | None = None, *tensors: str, arch: str = "llama") -> ModelConfig:
    """Load the file of a tiny model: 32 tokens, hidden size 16, 4 heads; additional tensors hold two numbers."""
    data = {name: np.ones(2, dtype=np.float32) for name in tensors}
    values = {key: value for key, value in (LLAMA | (metadata or {})).items() if value is not ...}
    embedding = {"token_embd.weight": np.zeros((32, 16), dtype=np.float32)}
    return load_model_config(write_gguf(path / "tiny.gguf", values, {**embedding, **data}, arch=arch))


def test_gguf_defaults(tmp_path: Path) -> None:
    config = llama_fields(gguf_config(tmp_path, {"llama.attention.head_count_kv": ...}))
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (32, 4, 4)
    assert (config.rope_theta, config.rope_scaling, config.sliding_window) == (10000.0, RopeScaling(), None)
    assert config.tie_word_embeddings
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == (False, False, False)


def test_gguf_keys(tmp_path: Path) -> None:
    sizes = {f"llama.{key}": 6 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    metadata = sizes | {"llama.rope.freq_base": 5000.0, "llama.vocab_size": 30}
    config = llama_fields(gguf_config(tmp_path, metadata, "output.weight"))
    assert (config.head_dim, config.rope_theta, config.vocab_size) == (6, 5000.0, 32)
    assert not config.tie_word_embeddings
    (rope,) = gguf_config(tmp_path, {"llama.rope.dimension_count": 2}).ropes
    assert (rope.head_dim, rope.rotary_dim) == (4, 2)


def test_gguf_sampling(tmp_path: Path) -> None:
    """The keys are those of the gguf package; numbers have the digits that were stored, not those of 32 bits."""
    keys = gguf.Keys.General
    stored: dict[str, tuple[str, Any]] = {
        keys.SAMPLING_TOP_K: ("top_k", 20),
        keys.SAMPLING_TOP_P: ("top_p", 0.95),
        keys.SAMPLING_MIN_P: ("min_p", 0.05),
        keys.SAMPLING_XTC_PROBABILITY: ("xtc_probability", 0.5),
        keys.SAMPLING_XTC_THRESHOLD: ("xtc_threshold", 0.1),
        keys.SAMPLING_TEMP: ("temperature", 0.7),
        keys.SAMPLING_PENALTY_LAST_N: ("repeat_last_n", -1),
        keys.SAMPLING_PENALTY_REPEAT: ("repetition_penalty", 1.05),
        keys.SAMPLING_MIROSTAT: ("mirostat", 2),
        keys.SAMPLING_MIROSTAT_TAU: ("mirostat_tau", 5.0),
        keys.SAMPLING_MIROSTAT_ETA: ("mirostat_eta", 0.1),
    }
    metadata = {key: value for key, (_, value) in stored.items()} | {keys.SAMPLING_SEQUENCE: "top_k;temperature"}
    assert {key for name, key in vars(keys).items() if name.startswith("SAMPLING")} == metadata.keys()
    expected = dict(stored.values()) | {"samplers": ["top_k", "temperature"]}
    assert gguf_config(tmp_path, metadata).recommended_sampling == expected
    assert gguf_config(tmp_path).recommended_sampling == {}


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    linear = RopeScaling(rope_type="linear", factor=4.0)
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}

    def scaling(metadata: dict[str, Any] | None, *tensors: str) -> RopeScaling:
        (rope,) = gguf_config(tmp_path, metadata, *tensors).ropes
        return rope.scaling

    assert scaling(keys) == linear
    assert scaling({"llama.rope.scale_linear": 4.0}) == linear
    assert scaling(keys | {"llama.rope.scaling.type": "none"}) == RopeScaling()
    factors = RopeScaling(
        rope_type="longrope", original_max_position_embeddings=128, short_factor=(1.0, 1.0), long_factor=(1.0, 1.0)
    )
    assert scaling(None, "rope_freqs.weight") == factors


def test_gguf_end_tokens(tmp_path: Path) -> None:
    tokens = ["a", "<|endoftext|>", "<|im_end|>", "b", "<|eot_id|>", "<end_of_turn>", "<|eom_id|>", "</s>"]
    config = gguf_config(tmp_path, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 7})
    assert config.eos_token_ids == (7, 1, 2, 4, 5, 6)
    stored = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.bos_token_id": 0}
    config = gguf_config(tmp_path, stored | {"tokenizer.ggml.tokens": tokens[:1]})
    assert (config.eos_token_ids, config.bos_token_id) == ((3, 4), 0)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.block_count": ...}, (), "llama.block_count: is missing"),
        ({"llama.attention.causal": False}, (), "llama.attention.causal: False is not supported"),
        ({"llama.feed_forward_length": [8, 8]}, (), "llama.feed_forward_length: must be 1 integers of at least 1"),
        ({"llama.embedding_length": 8}, (), r"token_embd.weight: shape \(32, 16\) does not fit hidden size 8"),
        ({"llama.attention.value_length": 8}, (), "value_length: 8 differs from the head dimension 4"),
        ({"llama.rope.dimension_count": 6}, (), "rope.dimension_count: must be even and at most the head size 4, not"),
        ({"llama.block_count": 10**9}, (), "llama.block_count: must be an integer from 1 to 1024"),
        ({"llama.nextn_predict_layers": "x"}, (), "llama.nextn_predict_layers: must be an integer"),
        ({"llama.expert_gating_func": "x"}, (), "llama.expert_gating_func: must be an integer"),
        ({"llama.attention.head_count": [0, 0]}, (), "llama.attention.head_count: must be an integer"),
        ({"llama.rope.freq_base": 0.0}, (), "rope.freq_base: must be a number above 0"),
        ({"llama.rope.scaling.type": "warp"}, (), "rope.scaling.type: 'warp' is not supported"),
        ({"llama.rope.scaling.factor": 2.0}, ("rope_freqs.weight",), "rope_freqs.weight: .*linear factor 2.0"),
        ({"llama.expert_count": 8}, (), "llama.expert_used_count: is missing"),
        ({"split.count": 3}, (), "split.count: the model has 3 files"),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(33)]}, (), "has 33 tokens, but the embedding has 32 rows"),
        ({"tokenizer.ggml.eos_token_id": 32}, (), "eos_token_id: must be token ids below 32"),
    ],
)
def test_gguf_refused(metadata: dict[str, Any], tensors: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        gguf_config(tmp_path, metadata, *tensors)


STATES = {"block_count": 4, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2}
STATES |= {"ssm.time_step_rank": 4, "ssm.inner_size": 64}


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("qwen35", {"attention.recurrent_layers": [True] * 3}, "attention.recurrent_layers: has 3 elements"),
        ("qwen35", {"attention.recurrent_layers": [True] * 4}, "attention.recurrent_layers: no layer has"),
        ("qwen35", {"ssm.inner_size": 66}, "ssm.inner_size: 66 is no multiple of the 4 value heads"),
        ("qwen35", {"ssm.inner_size": 48}, "ssm.inner_size: heads of 12 are no multiple of 16"),
        ("qwen35", {"ssm.time_step_rank": ...}, "ssm.time_step_rank: is missing"),
        ("qwen35", {"ssm.group_count": 3}, "ssm.time_step_rank: 4 value heads are no multiple of 3 key heads"),
        ("qwen35", {"ssm.state_size": 8}, "ssm.state_size: heads of 8 are no multiple of 16"),
        ("qwen35", {"ssm.conv_kernel": 17}, "ssm.conv_kernel: must be an integer from 2 to 16"),
        ("lfm2", {"attention.head_count_kv": 2}, "attention.head_count_kv: must be 4 numbers"),
        ("lfm2", {"attention.head_count_kv": [0, 2]}, "attention.head_count_kv: must be 4 numbers"),
        ("lfm2", {"attention.head_count_kv": [0] * 4}, "attention.head_count_kv: must be 4 numbers, not all 0"),
        ("lfm2", {"attention.head_count_kv": [0, 2, 2, 2], "shortconv.l_cache": 1}, "shortconv.l_cache: must be"),
    ],
)
def test_layers_with_states_refused(arch: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {key.removeprefix("llama."): value for key, value in LLAMA.items()} | STATES | changes
    with pytest.raises(ValueError, match=rf"tiny\.gguf: {arch}\.{message}"):
        gguf_config(tmp_path, {f"{arch}.{key}": value for key, value in values.items()}, arch=arch)


def test_keys_of_phi3(tmp_path: Path) -> None:
    """llama.cpp ignores a window for Llama, and so for Mistral. The default context is not that of config.json."""
    metadata = {key.replace("llama.", "phi3."): value for key, value in LLAMA.items()}
    config = gguf_config(tmp_path, metadata | {"phi3.attention.sliding_window": 9}, arch="phi3")
    assert config.attentions[0].window == 9
    assert gguf_config(tmp_path, {"llama.attention.sliding_window": 9}).attentions[0].window is None
    factors = ("rope_factors_short.weight", "rope_factors_long.weight")
    for key, expected in ({"phi3.rope.scaling.original_context_length": 64}, 64), ({}, 128):
        (rope,) = gguf_config(tmp_path, metadata | key, *factors, arch="phi3").ropes
        assert rope.scaling.original_max_position_embeddings == expected


def test_gguf_architecture_is_named(tmp_path: Path) -> None:
    message = r"general\.architecture: 'mamba' is not supported \(supported: llama, .*gemma3"
    with pytest.raises(ValueError, match=message):
        gguf_config(tmp_path, arch="mamba")


def test_gguf_without_embedding(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "empty.gguf", LLAMA, {"output_norm.weight": np.zeros(16, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"token_embd\.weight: the tensor is missing"):
        load_model_config(path)


def test_older_files_of_deepseek_v2(tmp_path: Path) -> None:
    """llama.cpp named the sizes of heads of latent attention like those of other attention, until April 2025."""
    values = {key.replace("llama.", "deepseek2."): value for key, value in LLAMA.items()}
    values |= {"deepseek2.attention.kv_lora_rank": 6, "deepseek2.rope.dimension_count": 4}
    sizes = {"deepseek2.attention.key_length": 12, "deepseek2.attention.value_length": 8}
    older = gguf_config(tmp_path, values | sizes | {"deepseek2.attention.head_count_kv": 4}, arch="deepseek2")
    sizes |= {f"{key}_mla": size for key, size in sizes.items()}
    sizes |= {"deepseek2.attention.key_length": 10, "deepseek2.attention.value_length": 6}
    newer = gguf_config(tmp_path, values | sizes | {"deepseek2.attention.head_count_kv": 1}, arch="deepseek2")
    assert older.layers == newer.layers
    latent = older.attentions[0].latent
    assert latent is not None
    assert (latent.nope_head_dim, latent.rope_head_dim, latent.v_head_dim) == (8, 4, 8)
