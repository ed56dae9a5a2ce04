"""Dequantised weights, compared with those of the `gguf` package, bit for bit."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.weights import Weight, load_weights
from engine.weights import dequantize as dequantization
from tests.support.gguf_files import write_gguf
from tests.support.model_configs import llama_config

Array = np.ndarray[Any, Any]
Type = GGMLQuantizationType


def _can_dequantize(ggml_type: GGMLQuantizationType) -> bool:
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    try:
        gguf.dequantize(np.zeros((1, type_size), dtype=np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return block_size > 0


DEQUANTIZABLE = [ggml_type for ggml_type in GGMLQuantizationType if _can_dequantize(ggml_type)]
NUM_ROWS, ROW_SIZE = 70, 512  # more than one chunk, the last one not full

CONFIG = llama_config(
    architecture="llama",
    vocab_size=32,
    num_token_ids=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=128,
    is_interleaved=True,
)


def random_bytes(ggml_type: GGMLQuantizationType, seed: int) -> Array:
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    shape = (NUM_ROWS, ROW_SIZE // block_size * type_size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def dequantize(data: Array, ggml_type: GGMLQuantizationType) -> Array:
    with np.errstate(all="ignore"):
        values: Array = gguf.dequantize(data, ggml_type)
    return values


def assert_same_bits(actual: Weight, expected: Array) -> None:
    """Check that all bits are equal, except that any NaN equals any other: random bytes give many."""
    assert isinstance(actual, torch.Tensor)
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(actual.isnan().numpy(), nan)
    np.testing.assert_array_equal(actual.numpy().view(np.int32)[~nan], expected.view(np.int32)[~nan])


def write_every_type(path: Path) -> Path:
    """Write a file with a tensor of random bytes for each type, named by its index in DEQUANTIZABLE."""
    names = [f"blk.{index}.ffn_up.weight" for index in range(len(DEQUANTIZABLE))]
    tensors = {name: random_bytes(DEQUANTIZABLE[index], index) for index, name in enumerate(names)}
    return write_gguf(path, {}, tensors, dict(zip(names, DEQUANTIZABLE, strict=True)))


@pytest.mark.parametrize("gguf_chunk_size", [2**20, 2**13])
def test_every_type(tmp_path: Path, gguf_chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    every_type = write_every_type(tmp_path / "every_type.gguf")
    monkeypatch.setattr(dequantization, "GGUF_CHUNK_SIZE", gguf_chunk_size)
    assert {Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q8_0, Type.Q6_K, Type.IQ2_XXS} <= set(DEQUANTIZABLE)
    weights = dict(load_weights(every_type, CONFIG, torch.float32))
    assert len(weights) == len(DEQUANTIZABLE)
    for index, ggml_type in enumerate(DEQUANTIZABLE):
        tensor = weights[f"model.layers.{index}.mlp.up_proj.weight"]
        assert_same_bits(tensor, dequantize(random_bytes(ggml_type, index), ggml_type))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ggml_type", [Type.F32, Type.F16, Type.BF16, Type.Q4_1, Type.Q8_0, Type.Q4_0, Type.Q5_1])
def test_rounding(ggml_type: GGMLQuantizationType, dtype: torch.dtype, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    data = gguf.quantize(values, ggml_type)
    path = write_gguf(tmp_path / "w.gguf", {}, {"output.weight": data}, {"output.weight": ggml_type})
    ((name, tensor),) = load_weights(path, CONFIG, dtype)
    assert name == "lm_head.weight"
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(dequantize(data, ggml_type)).to(dtype))


@pytest.mark.parametrize("ggml_type", [Type.Q4_1, Type.Q5_1])  # unpacked here and in threads
def test_inference_mode(ggml_type: GGMLQuantizationType, tmp_path: Path) -> None:
    """The engine loads weights in inference mode."""
    data = random_bytes(ggml_type, 1)
    path = write_gguf(tmp_path / "w.gguf", {}, {"output.weight": data}, {"output.weight": ggml_type})
    with torch.inference_mode():
        ((_, tensor),) = load_weights(path, CONFIG, torch.float32)
        assert_same_bits(tensor, dequantize(data, ggml_type))


def test_the_log_says_what_unpacking_costs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    types = {"blk.0.ffn_up.weight": Type.IQ2_XXS, "blk.1.ffn_up.weight": Type.IQ2_XXS, "blk.2.ffn_up.weight": Type.Q4_K}
    tensors = {name: random_bytes(ggml_type, 1) for name, ggml_type in types.items()}
    path = write_gguf(tmp_path / "w.gguf", {}, tensors | {"output.weight": np.ones((2, 32), dtype=np.float32)}, types)
    caplog.set_level("INFO")
    for keep_packed, message in (
        ({"Q4_K"}, "tensors unpacked to bfloat16 (16 bits): 2 of IQ2_XXS (2.06 bits a weight in the file)"),
        ({"Q4_K", "IQ2_XXS"}, None),
    ):
        caplog.clear()
        list(load_weights(path, CONFIG, torch.bfloat16, keep_packed=frozenset(keep_packed)))
        assert caplog.messages == ([message] if message else [])
