"""Weights from GGUF files: their numbers, those of the `gguf` package bit for bit, names, and the order of rows."""

import gc
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.weights import PackedTensor, Weight, load_weights
from engine.weights import packed as dequantization
from tests.support.gguf_files import interleave, write_gguf
from tests.support.model_configs import TINY, llama_config

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

CONFIG = llama_config(**TINY | {"head_dim": 4}, is_interleaved=True)


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


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a tensor of random bytes for each type, named by its index in DEQUANTIZABLE."""
    names = [f"blk.{index}.ffn_up.weight" for index in range(len(DEQUANTIZABLE))]
    tensors = {name: random_bytes(DEQUANTIZABLE[index], index) for index, name in enumerate(names)}
    path = tmp_path_factory.mktemp("gguf") / "every_type.gguf"
    return write_gguf(path, {}, tensors, dict(zip(names, DEQUANTIZABLE, strict=True)))


@pytest.mark.parametrize(("gguf_chunk_size", "in_inference_mode"), [(2**20, True), (2**13, False)])
def test_every_type(
    every_type: Path, gguf_chunk_size: int, in_inference_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine loads weights in inference mode."""
    monkeypatch.setattr(dequantization, "GGUF_CHUNK_SIZE", gguf_chunk_size)
    assert {Type.F32, Type.BF16, Type.Q6_K, Type.IQ2_XXS} <= set(DEQUANTIZABLE)
    calls: list[tuple[int, ...]] = []
    with torch.inference_mode(mode=in_inference_mode):
        weights = dict(load_weights(every_type, CONFIG, torch.float32, lambda *progress: calls.append(progress)))
    assert len(weights) == len(DEQUANTIZABLE)
    for index, ggml_type in enumerate(DEQUANTIZABLE):
        tensor = weights[f"model.layers.{index}.mlp.up_proj.weight"]
        assert_same_bits(tensor, dequantize(random_bytes(ggml_type, index), ggml_type))
    sizes = [random_bytes(ggml_type, 0).nbytes for ggml_type in DEQUANTIZABLE]
    assert calls == [(sum(sizes[: index + 1]), sum(sizes)) for index in range(len(sizes))]


@pytest.mark.parametrize(
    ("ggml_type", "dtype"), [(Type.F32, torch.float16), (Type.BF16, torch.float16), (Type.Q5_1, torch.bfloat16)]
)
def test_rounding(ggml_type: GGMLQuantizationType, dtype: torch.dtype, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    data = gguf.quantize(values, ggml_type)
    path = write_gguf(tmp_path / "w.gguf", {}, {"output.weight": data}, {"output.weight": ggml_type})
    ((name, tensor),) = load_weights(path, CONFIG, dtype)
    assert name == "lm_head.weight"
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(dequantize(data, ggml_type)).to(dtype))


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


@pytest.mark.parametrize("ggml_type", [Type.Q4_0, Type.Q6_K])
def test_matrices_that_stay_packed(ggml_type: GGMLQuantizationType, tmp_path: Path) -> None:
    """Packed rows of q and k are reordered too; other types and vectors are dequantised."""
    data = random_bytes(ggml_type, seed=1)[:16]
    norm, up = np.ones(16, dtype=np.float32), np.ones((2, 3), dtype=np.float32)
    tensors = {
        "blk.0.attn_q.weight": np.ascontiguousarray(interleave(data, 4)),
        "blk.0.attn_v.weight": data,
        "blk.0.attn_norm.weight": norm,
        "blk.0.ffn_up.weight": up,
    }
    types = {name: ggml_type for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight")}
    path = write_gguf(tmp_path / "packed.gguf", {}, tensors, types)
    weights = dict(load_weights(path, CONFIG, torch.float32, keep_packed=frozenset({ggml_type.name})))
    prefix = "model.layers.0"
    for name in ("q_proj", "v_proj"):
        packed = weights[f"{prefix}.self_attn.{name}.weight"]
        assert isinstance(packed, PackedTensor)
        assert (packed.type_name, packed.shape, packed.nbytes) == (ggml_type.name, (16, ROW_SIZE), data.nbytes)
        np.testing.assert_array_equal(packed.data, data.reshape(-1))
        assert_same_bits(packed.dequantize(torch.float32), dequantize(data, ggml_type))
    assert_same_bits(weights[f"{prefix}.input_layernorm.weight"], norm)
    assert_same_bits(weights[f"{prefix}.mlp.up_proj.weight"], up)
    del weights
    gc.collect()
    assert isinstance(packed, PackedTensor)
    np.testing.assert_array_equal(packed.data, data.reshape(-1))  # the file is still mapped


def test_vectors_of_another_type(tmp_path: Path) -> None:
    tensors = {"output_norm.weight": np.ones(16, dtype=np.float32), "output.weight": np.ones((2, 16), dtype=np.float32)}
    path = write_gguf(tmp_path / "vectors.gguf", {}, tensors)
    weights = dict(load_weights(path, CONFIG, torch.bfloat16, vector_dtype=torch.float32))
    dtypes = {name: tensor.dtype for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    assert dtypes == {"model.norm.weight": torch.float32, "lm_head.weight": torch.bfloat16}


def test_a_model_in_several_files(tmp_path: Path) -> None:
    tensors = {f"blk.{layer}.ffn_up.weight": random_bytes(Type.Q4_1, layer) for layer in range(3)}
    write_gguf(tmp_path / "m.gguf", {}, tensors, dict.fromkeys(tensors, Type.Q4_1), split_max_tensors=2)
    calls: list[tuple[int, int]] = []
    path = tmp_path / "m-00002-of-00002.gguf"
    weights = dict(load_weights(path, CONFIG, torch.float32, lambda done, total: calls.append((done, total))))
    for layer, data in enumerate(tensors.values()):
        assert_same_bits(weights[f"model.layers.{layer}.mlp.up_proj.weight"], dequantize(data, Type.Q4_1))
    assert calls[-1] == (sum(data.nbytes for data in tensors.values()),) * 2


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.0.ffn_gates.weight", np.zeros(4, dtype=np.float32), "no supported model has such a tensor"),
        ("blk.x.ffn_up.weight", np.zeros(4, dtype=np.float32), "no supported model has such a tensor"),
        ("token_embd", np.zeros(4, dtype=np.float32), "no supported model has such a tensor"),
        ("output_norm.weight", np.zeros(4, dtype=np.int32), "I32"),
        ("blk.0.attn_q.weight", np.zeros((14, 4), dtype=np.float32), "14 rows do not divide into heads of 4"),
    ],
)
def test_refused(name: str, tensor: Array, message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", {}, {name: tensor})
    with pytest.raises(ValueError, match=rf"odd\.gguf: {name}: .*{message}"):
        list(load_weights(path, CONFIG, torch.float32))


def test_truncated(every_type: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(every_type.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.gguf: blk\.\d+\.ffn_up\.weight: ends at byte"):
        list(load_weights(path, CONFIG, torch.float32))


def test_layers_that_predict_later_tokens(tmp_path: Path) -> None:
    number = CONFIG.num_hidden_layers
    config = msgspec.structs.replace(CONFIG, num_ignored_layers=1)
    ones = np.ones(2, dtype=np.float32)
    names = (f"blk.{number}.nextn.enorm.weight", f"blk.{number}.attn_norm.weight", "output_norm.weight")
    path = write_gguf(tmp_path / "mtp.gguf", {}, dict.fromkeys(names, ones))
    assert [name for name, _ in load_weights(path, config, torch.float32)] == ["model.norm.weight"]
    path = write_gguf(tmp_path / "more.gguf", {}, {f"blk.{number + 1}.nextn.enorm.weight": ones})
    with pytest.raises(ValueError, match=r"nextn\.enorm\.weight: no supported model"):
        list(load_weights(path, config, torch.float32))


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (["attn_kv_b"], ["kv_b_proj.weight"]),
        (["attn_k_b", "attn_v_b"], ["k_b_proj.transposed", "v_b_proj.weight"]),
        (["attn_kv_b", "attn_k_b", "attn_v_b"], ["k_b_proj.transposed", "v_b_proj.weight"]),
    ],
)
def test_latent_keys_and_values_that_are_stored_twice(stored: list[str], kept: list[str], tmp_path: Path) -> None:
    """ik_llama.cpp writes the matrix of both beside its halves."""
    tensors = {f"blk.1.{name}.weight": np.ones((4, 4), dtype=np.float32) for name in stored}
    weights = load_weights(write_gguf(tmp_path / "latent.gguf", {}, tensors), CONFIG, torch.float32)
    assert sorted(name for name, _ in weights) == [f"model.layers.1.self_attn.{name}" for name in kept]
