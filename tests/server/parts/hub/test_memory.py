"""Estimates of memory, by the metadata of models as their files have it."""

from typing import Any

import pytest
from msgspec.structs import replace

from engine.config import LatentSpec, ModelConfig
from server.parts.hub import memory
from server.parts.hub.memory import Memory, ModelShape, gguf_shape, memory_lines, model_shape
from tests.support.model_configs import TINY, llama_config

GB = 10**9
LATENT = LatentSpec(q_lora_rank=None, kv_lora_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128)


def gguf(arch: str, layers: int, context: int, hidden: int, heads: object, **attention: object) -> dict[str, Any]:
    """Return the metadata of a GGUF file."""
    values = {
        "block_count": layers,
        "context_length": context,
        "embedding_length": hidden,
        "attention.head_count": heads,
    }
    values |= {f"attention.{name}": value for name, value in attention.items()}
    return {"general.architecture": arch} | {f"{arch}.{name}": value for name, value in values.items()}


def config(layers: int, context: int, kv_heads: int, head_dim: int, **attention: Any) -> ModelConfig:
    """Return the configuration of a Llama; `attention` are fields of its layers' attention."""
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": context, "num_key_value_heads": kv_heads}
    made = llama_config(**TINY | sizes | {"head_dim": head_dim})
    changed = replace(made.layers[0], attention=replace(made.attentions[0], **attention))
    return replace(made, layers=(changed,) * layers)


QWEN3_4B = gguf("qwen3", 36, 40960, 2560, 32, head_count_kv=8, key_length=128, value_length=128)
QWEN3_4B_SHAPE = ModelShape(40960, 36 * 8 * (128 + 128) * 2, 0, 0)


def test_shapes() -> None:
    hidden, latent = ModelShape(100, 36 * 8 * (80 + 80) * 2, 0, 0), ModelShape(163840, 27 * 576 * 2, 0, 0)
    layers = QWEN3_4B | {"qwen3.block_count": 3, "qwen3.attention.head_count_kv": [8, 2, 0]}
    latent_gguf = gguf("deepseek2", 27, 163840, 2048, 16, kv_lora_rank=512) | {"deepseek2.rope.dimension_count": 64}
    for found, shape in (
        (gguf_shape(QWEN3_4B), QWEN3_4B_SHAPE),
        (model_shape(config(36, 40960, 8, 128)), QWEN3_4B_SHAPE),
        # Head sizes follow from the hidden size.
        (gguf_shape(gguf("qwen3", 36, 100, 2560, 32, head_count_kv=8)), hidden),
        # Heads of each layer, and latent attention.
        (gguf_shape(layers), ModelShape(40960, 10 * 256 * 2, 0, 0)),
        (gguf_shape(latent_gguf), latent),
        (model_shape(config(27, 163840, 1, 576, latent=LATENT)), latent),
    ):
        assert found == shape


def test_sliding_windows() -> None:
    """Gemma 3 4B: 34 layers, of which every sixth sees all tokens; the others see 1024."""
    lengths = {"key_length": 256, "value_length": 256}
    metadata = gguf("gemma3", 34, 131072, 2560, 8, head_count_kv=4, sliding_window=1024, **lengths)
    width = 4 * 512 * 2
    shape = ModelShape(131072, 5 * width, 29 * width, 1024)
    assert gguf_shape(metadata) == shape
    near, far = config(29, 131072, 4, 256, window=1024), config(5, 131072, 4, 256)
    assert model_shape(replace(near, layers=near.layers + far.layers)) == shape
    pattern = [layer % 6 != 5 for layer in range(34)]
    assert gguf_shape(metadata | {"gemma3.attention.sliding_window_pattern": pattern}) == shape
    assert shape.kv_cache_bytes(1000) == 1000 * 34 * width
    assert shape.kv_cache_bytes(2024) == 2024 * 5 * width + 1024 * 29 * width


def test_metadata_that_says_too_little() -> None:
    for metadata in ({}, {"general.architecture": "x"}, QWEN3_4B | {"qwen3.block_count": "many"}):
        assert gguf_shape(metadata) is None


@pytest.mark.parametrize(
    "shape", [QWEN3_4B_SHAPE, ModelShape(131072, 20480, 118784, 1024), ModelShape(9000, 0, 64, 512)]
)
@pytest.mark.parametrize("num_bytes", [0, 10**6, 10**8, 3 * 10**8, 10**9, 10**12])
def test_as_many_tokens_as_fit(shape: ModelShape, num_bytes: int) -> None:
    num_tokens = shape.max_tokens(num_bytes)
    if num_tokens == shape.context:
        assert shape.kv_cache_bytes(num_tokens) <= num_bytes
    else:
        assert num_tokens % 1024 == 0
        assert shape.kv_cache_bytes(num_tokens) <= num_bytes or num_tokens == 0
        assert shape.kv_cache_bytes(num_tokens + 1024) > num_bytes


def test_whether_it_fits() -> None:
    """As the engine: half of what the weights leave is for the KV cache, which must hold one request."""
    for free, text in (
        (20 * GB, "20 GB free: it fits"),
        (6 * GB, r"6.0 GB free: it fits with a shorter context, --max-model-len 11264"),
        (3 * GB, r"3.0 GB free: it fits with a shorter context, --max-model-len 1024"),
        (2_600_000_000, "2.6 GB free: it does not fit, too little is left for a KV cache"),
        (2 * GB, "2.0 GB free: it does not fit, the weights alone are larger"),
    ):
        assert Memory("Memory", free, 0, 0.5).describe_fit(2_500_000_000, QWEN3_4B_SHAPE) == f"Memory, {text}", free


def test_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '24000, 20000'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * GB)
    assert list(memory_lines(2_500_000_000, QWEN3_4B_SHAPE)) == [
        "Takes about 2.5 GB of memory for the weights, and 6.0 GB for the KV cache of one request of 40960 tokens",
        "GPU, 21 GB free: it fits",
        "Memory, 4.0 GB free: it fits with a shorter context, --max-model-len 4096",
    ]
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert len(list(memory_lines(2_500_000_000, QWEN3_4B_SHAPE))) == 2
