"""Rotary frequencies and angles, compared with those of transformers."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.config import Fields, RopeScaling, RopeSpec
from engine.config.rope import read_rope
from engine.kernels.interface import KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from engine.model.rotary import CHUNK, RotaryEmbedding, inverse_frequencies, table_bytes

CPU = torch.device("cpu")
MAX_MODEL_LEN = 5000
LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
POSITIONS = torch.tensor([0, 1, 2, 31, 1000, 4999, 4999, 7])


def plain_rope(scaling: RopeScaling | None = None, head_dim: int = 64, theta: float = 10000.0) -> RopeSpec:
    return RopeSpec(head_dim=head_dim, rotary_dim=head_dim, theta=theta, scaling=scaling or RopeScaling())


LONG: dict[str, Any] = {"short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [2.0 * i + 3 for i in range(8)]}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
# Parameters for heads of 16, and the length of the context.
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, 4096),
    "llama3": ({"rope_type": "llama3", **LLAMA3}, 4096),
    "llama3, others": ({"rope_type": "llama3", **LLAMA3, "factor": 32.0, "low_freq_factor": 0.5}, 4096),
    "yarn of gpt-oss": (YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}, 4096),
    "yarn of DeepSeek": (YARN | {"mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 24.0}, 4096),
    "yarn, attention factor": (YARN | {"attention_factor": 1.25, "beta_slow": 2.0}, 4096),
    "longrope, short": ({"rope_type": "longrope", "factor": 16.0, **LONG}, 512),
    "longrope, long": ({"rope_type": "longrope", "factor": 16.0, **LONG}, 513),
    "longrope, attention factor": ({"rope_type": "longrope", "factor": 16.0, "attention_factor": 1.5, **LONG}, 600),
    "proportional": ({"rope_type": "proportional", "partial_rotary_factor": 0.25}, 4096),
    "proportional, stretched": ({"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 4.0}, 4096),
    "yarn, partial": (YARN | {"partial_rotary_factor": 0.5}, 4096),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name: str) -> None:
    """Read from a configuration, frequencies and factor are those that transformers makes of the same one."""
    parameters, length = SCALINGS[name]
    parameters = {"rope_theta": 10000.0} | parameters
    sizes: dict[str, Any] = {"max_position_embeddings": 8192, "original_max_position_embeddings": 512}
    config: Any = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=parameters, **sizes)
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, seq_len=length)
    rope = read_rope(Fields("config.json", sizes), Fields("rope_parameters", parameters), 16, {})
    angles = POSITIONS[length > POSITIONS][:, None] * frequencies
    cos, sin = RotaryEmbedding(rope, length, CPU).k[POSITIONS[length > POSITIONS]].chunk(2, dim=1)
    num_pairs = len(frequencies)
    torch.testing.assert_close(cos[:, :num_pairs], angles.cos() * factor, rtol=0, atol=1e-4)
    torch.testing.assert_close(sin[:, :num_pairs], angles.sin() * factor, rtol=0, atol=1e-4)
    # What is not rotated keeps its values.
    assert torch.equal(cos[:, num_pairs:], torch.ones(len(cos), 8 - num_pairs))
    assert not sin[:, num_pairs:].any()


def test_no_rotation() -> None:
    table = RotaryEmbedding(RopeSpec(head_dim=16, rotary_dim=0), 9, CPU).k
    assert torch.equal(table, torch.cat((torch.ones(9, 8), torch.zeros(9, 8)), dim=1))


def test_pairs_in_the_middle_of_a_head() -> None:
    """In the cached vector of latent attention, rotated pairs come after those of the latent vector."""
    rope = RopeSpec(head_dim=12, rotary_dim=4, first_pair=3)
    cos, sin = RotaryEmbedding(rope, 9, CPU).k.chunk(2, dim=1)
    angles = torch.arange(9)[:, None] * inverse_frequencies(RopeSpec(head_dim=4, rotary_dim=4), 9)
    expected = torch.ones(9, 6)
    expected[:, 3:5] = angles.cos()
    torch.testing.assert_close(cos, expected)
    expected = torch.zeros(9, 6)
    expected[:, 3:5] = angles.sin()
    torch.testing.assert_close(sin, expected)


def test_queries_scaled_by_position() -> None:
    """As Ministral3Attention of transformers scales them (Llama 4)."""
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    rope = RopeSpec(head_dim=16, rotary_dim=8, query_beta=0.1, query_context=512)
    rotary = RotaryEmbedding(rope, MAX_MODEL_LEN, CPU)
    rotations = rotary.gather(TorchKernels(KernelOptions(torch.float32), CPU), POSITIONS)
    expected = rotations.k * get_llama_4_attn_scale(POSITIONS[None], 0.1, 512).reshape(-1, 1)
    torch.testing.assert_close(rotations.q, expected)
    assert rotations.q[5, 7] == pytest.approx(1 + 0.1 * math.log(1 + 4999 // 512))  # dimension 7 is not rotated


def test_rows_are_computed_when_a_request_gets_there() -> None:
    rope = RopeSpec(head_dim=16, rotary_dim=8, query_beta=0.1, query_context=512)
    length = 2 * CHUNK + 1000
    whole, lazy = RotaryEmbedding(rope, length, CPU), RotaryEmbedding(rope, length, CPU)
    whole.extend(length)
    assert len(whole.k) == whole.num_rows == length
    for num_rows, num_computed in ((1, CHUNK), (CHUNK, CHUNK), (CHUNK + 1, 2 * CHUNK), (length + 99, length)):
        lazy.extend(num_rows)
        assert lazy.num_rows == num_computed
        for table, expected in ((lazy.k, whole.k), (lazy.q, whole.q)):
            assert torch.equal(table[:num_computed], expected[:num_computed])
            assert not table[num_computed:].any()
    angles = torch.tensor([length - 1.0]) * whole.frequencies
    torch.testing.assert_close(whole.k[-1, :4], angles.cos())


def test_bytes_of_the_tables_are_those_of_the_tensors() -> None:
    ropes = [RopeSpec(head_dim=16, rotary_dim=8), RopeSpec(head_dim=24, rotary_dim=24, query_beta=0.1)]
    tables = [RotaryEmbedding(rope, 99, CPU) for rope in ropes]
    assert table_bytes(ropes, 99) == tables[0].k.nbytes + tables[1].k.nbytes + tables[1].q.nbytes


def test_llama3_as_factors_is_equal() -> None:
    """GGUF files store the scaling of Llama 3.1 as factors of the frequencies."""
    expected = inverse_frequencies(plain_rope(RopeScaling(rope_type="llama3", **LLAMA3)), MAX_MODEL_LEN)
    factors = inverse_frequencies(plain_rope(), MAX_MODEL_LEN) / expected
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)
    values = tuple(factors.tolist())
    scaling = RopeScaling(rope_type="longrope", short_factor=values, long_factor=values)
    torch.testing.assert_close(inverse_frequencies(plain_rope(scaling), MAX_MODEL_LEN), expected)
