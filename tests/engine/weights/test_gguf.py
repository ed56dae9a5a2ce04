"""Weights from GGUF files: names, order of rows, and matrices that stay packed."""

import gc
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from engine.config import load_model_config
from engine.kernels.cpu.weights import PACKED_TYPES
from engine.shared.gguf import GGUFFile
from engine.weights import PackedTensor, load_weights
from engine.weights.gguf import huggingface_name
from tests.engine.weights.test_dequantize import (
    CONFIG,
    DEQUANTIZABLE,
    ROW_SIZE,
    Array,
    Type,
    assert_same_bits,
    dequantize,
    random_bytes,
    write_every_type,
)
from tests.support.gguf_files import LLAMA, interleave, write_gguf


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_every_type(tmp_path_factory.mktemp("gguf") / "every_type.gguf")


@pytest.mark.parametrize("ggml_type", [Type.F32, Type.Q4_1])
def test_order_of_query_and_key_rows(ggml_type: GGMLQuantizationType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((rows, 64), dtype=np.float32) for rows in (16, 8))
    query_bias, key_bias = (rng.standard_normal(rows, dtype=np.float32) for rows in (16, 8))
    tensors = {
        "blk.0.attn_q.weight": gguf.quantize(interleave(query, 4), ggml_type),
        "blk.0.attn_k.weight": gguf.quantize(interleave(key, 2), ggml_type),
        "blk.0.attn_q.bias": interleave(query_bias, 4),
        "blk.0.attn_k.bias": interleave(key_bias, 2),
        "blk.0.attn_v.weight": gguf.quantize(key, ggml_type),
    }
    types = {name: ggml_type for name in tensors if name.endswith(".weight")}
    weights = dict(load_weights(write_gguf(tmp_path / "qk.gguf", {}, tensors, types), CONFIG, torch.float32))
    prefix = "model.layers.0.self_attn"
    for name, values in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        expected = dequantize(gguf.quantize(values, ggml_type), ggml_type)
        assert_same_bits(weights[f"{prefix}.{name}.weight"], expected)
    assert_same_bits(weights[f"{prefix}.q_proj.bias"], query_bias)
    assert_same_bits(weights[f"{prefix}.k_proj.bias"], key_bias)


PACKABLE = [GGMLQuantizationType[name] for name in sorted(PACKED_TYPES)]


@pytest.mark.parametrize("ggml_type", PACKABLE)
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


def test_names_of_a_whole_model(tmp_path: Path) -> None:
    layer = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    names = ["token_embd.weight", "output_norm.weight", *(f"blk.11.{name}.weight" for name in layer)]
    assert [huggingface_name(name) for name in names] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.11.input_layernorm.weight",
        "model.layers.11.self_attn.q_proj.weight",
        "model.layers.11.self_attn.k_proj.weight",
        "model.layers.11.self_attn.v_proj.weight",
        "model.layers.11.self_attn.o_proj.weight",
        "model.layers.11.pre_feedforward_layernorm.weight",
        "model.layers.11.mlp.gate_proj.weight",
        "model.layers.11.mlp.up_proj.weight",
        "model.layers.11.mlp.down_proj.weight",
    ]


def test_rope_factors_are_part_of_the_configuration(tmp_path: Path) -> None:
    """They stay float32, and are no weights."""
    factors = np.array([1.0, 1.1], dtype=np.float32)
    embedding = np.zeros((32, 16), dtype=np.float32)
    tensors = {"rope_freqs.weight": factors, "token_embd.weight": embedding}
    path = write_gguf(tmp_path / "rope.gguf", LLAMA, tensors)
    config = load_model_config(path)
    (rope,) = config.ropes
    stored = tuple(map(float, factors))
    assert (rope.scaling.rope_type, rope.scaling.short_factor, rope.scaling.long_factor) == ("longrope", stored, stored)
    assert stored[1] != 1.1  # float32
    weights = dict(load_weights(path, config, torch.bfloat16))
    assert list(weights) == ["model.embed_tokens.weight"]
    tensor = weights["model.embed_tokens.weight"]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.bfloat16


def test_a_model_in_several_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    tensors = {f"blk.{layer}.ffn_up.weight": random_bytes(Type.Q4_1, layer) for layer in range(3)}
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=Type.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    calls: list[tuple[int, int]] = []
    path = tmp_path / "m-00002-of-00002.gguf"
    weights = dict(load_weights(path, CONFIG, torch.float32, lambda done, total: calls.append((done, total))))
    for layer, data in enumerate(tensors.values()):
        assert_same_bits(weights[f"model.layers.{layer}.mlp.up_proj.weight"], dequantize(data, Type.Q4_1))
    assert calls[-1] == (sum(data.nbytes for data in tensors.values()),) * 2


def test_smollm2(smollm2_path: Path) -> None:
    config = load_model_config(smollm2_path)
    weights = dict(load_weights(smollm2_path, config, torch.float32))
    with GGUFFile(smollm2_path) as file:
        assert len(weights) == len(file.tensors)
        for info in file.tensors.values():
            with file.tensor_data(info) as data:
                rows = np.array(data, dtype=np.uint8).reshape(*info.shape[:-1], -1)
            expected = dequantize(rows, GGMLQuantizationType(info.ggml_type))
            tensor = weights[huggingface_name(info.name)]
            assert isinstance(tensor, torch.Tensor)
            if ".attn_q." in info.name or ".attn_k." in info.name:
                tensor = torch.from_numpy(
                    interleave(tensor.numpy(), tensor.shape[0] // config.layers[0].attention.head_dim)
                )
            assert_same_bits(tensor, expected)


def test_progress(every_type: Path) -> None:
    calls: list[tuple[int, int]] = []
    list(load_weights(every_type, CONFIG, torch.bfloat16, lambda done, total: calls.append((done, total))))
    sizes = [random_bytes(ggml_type, 0).nbytes for ggml_type in DEQUANTIZABLE]
    assert calls == [(sum(sizes[: index + 1]), sum(sizes)) for index in range(len(sizes))]


def test_an_iterator_that_is_not_exhausted(every_type: Path) -> None:
    weights = load_weights(every_type, CONFIG, torch.bfloat16)
    next(weights)
    del weights
    gc.collect()  # no warning, no error


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.0.ffn_gates.weight", np.zeros(4, dtype=np.float32), "no supported model has such a tensor"),
        ("blk.x.ffn_up.weight", np.zeros(4, dtype=np.float32), "no supported model has such a tensor"),
        ("token_embd", np.zeros(4, dtype=np.float32), "no supported model has such a tensor"),
        ("output_norm.weight", np.zeros(4, dtype=np.int32), "I32"),
        ("output_norm.weight", np.zeros(4, dtype=np.float64), "F64"),
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
