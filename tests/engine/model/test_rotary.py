"""Rotary frequencies and angles, compared with those of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import ModelConfig, RopeScaling
from engine.model.rotary import RotaryEmbedding, inverse_frequencies

CPU = torch.device("cpu")
MAX_MODEL_LEN = 5000
LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0},
]


def model_config(scaling: RopeScaling, head_dim: int = 64, theta: float = 10000.0) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=100,
        num_token_ids=100,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def transformers_rotary(scaling: dict[str, Any], head_dim: int, theta: float) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=8192,
            rope_parameters={"rope_theta": theta, **scaling},
        )
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_angles_are_those_of_transformers(scaling: dict[str, Any], head_dim: int, theta: float) -> None:
    rotary = RotaryEmbedding(model_config(RopeScaling(**scaling), head_dim, theta), MAX_MODEL_LEN, CPU, factors=None)
    positions = torch.tensor([0, 1, 2, 31, 1000, 4999, 4999, 7])
    cos, sin = rotary.cos[positions], rotary.sin[positions]
    assert cos.shape == sin.shape == (8, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    expected_cos, expected_sin = transformers_rotary(scaling, head_dim, theta)(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, expected_cos[0, :, : head_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, expected_sin[0, :, : head_dim // 2], rtol=0, atol=1e-6)


def test_frequencies_from_their_definition() -> None:
    actual = inverse_frequencies(model_config(RopeScaling(), head_dim=8, theta=10000.0), factors=None)
    torch.testing.assert_close(actual, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_factors_divide_the_frequencies() -> None:
    factors = torch.linspace(1, 8, 32)
    config = model_config(RopeScaling(rope_type="factors"))
    plain = inverse_frequencies(model_config(RopeScaling()), factors=None)
    torch.testing.assert_close(inverse_frequencies(config, factors), plain / factors)


def test_llama3_as_factors_is_equal() -> None:
    """GGUF files store the scaling of Llama 3.1 as factors of the frequencies."""
    expected = inverse_frequencies(model_config(RopeScaling(rope_type="llama3", **LLAMA3)), factors=None)
    factors = inverse_frequencies(model_config(RopeScaling()), factors=None) / expected
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)
    config = model_config(RopeScaling(rope_type="factors"))
    torch.testing.assert_close(inverse_frequencies(config, factors), expected)
