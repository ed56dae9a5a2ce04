"""LoRA adapters in GGUF files, and files of both formats that are damaged, huge, or not regular files."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from engine.config import load_model_config
from engine.lora.checkpoint import module_shapes
from engine.lora.reader import load_lora
from tests.support.examples import num_examples
from tests.support.gguf_files import interleave, write_gguf
from tests.support.lora_files import (
    ATTENTION,
    CONFIG,
    FIELDS,
    MLP,
    MODULES,
    PEFT_WARNINGS,
    A,
    B,
    Tensors,
    refusal_of,
    save_adapter,
    small_adapter,
    write_folder,
)
from tests.support.model_configs import llama_config

pytestmark = PEFT_WARNINGS


GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
GGUF_NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
NUM_HEADS = {"q_proj": FIELDS["num_attention_heads"], "k_proj": FIELDS["num_key_value_heads"]}


def gguf_tensors(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Convert PEFT's tensors as llama.cpp does: with other names, and the rows of q and k in another order."""
    converted = {}
    for name, tensor in tensors.items():
        *_, layer, _, part, half, _ = name.split(".")
        rows = tensor.float().numpy()
        if part in NUM_HEADS and half == "lora_B":
            rows = interleave(rows, NUM_HEADS[part])
        converted[f"blk.{layer}.{GGUF_NAMES[part]}.weight.{half.lower()}"] = rows
    return converted


ADAPTER = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}


def write_adapter(path: Path, tensors: Any, types: Any = None, arch: str = "llama", **changes: Any) -> Path:
    values = {key: value for key, value in {**ADAPTER, **changes}.items() if value is not ...}
    return write_gguf(path, values, tensors, types, arch)


def test_the_same_adapter_in_gguf(tmp_path: Path) -> None:
    """In GGUF files, the architecture of a Mistral model is called llama."""
    whole_adapter = tmp_path / "whole"
    save_adapter(whole_adapter, LoraConfig(r=32, lora_alpha=4, target_modules=list(ATTENTION + MLP)))
    tensors = gguf_tensors(load_file(whole_adapter / "adapter_model.safetensors"))
    expected = load_lora(whole_adapter, CONFIG)
    mistral = msgspec.structs.replace(CONFIG, architecture="mistral")
    actual = load_lora(write_adapter(tmp_path / "adapter.gguf", tensors), mistral)
    assert sorted(actual.modules) == sorted(MODULES)
    assert actual.fingerprint == expected.fingerprint
    for name, matrices in expected.modules.items():
        assert torch.equal(actual.modules[name].a, matrices.a)
        assert torch.equal(actual.modules[name].b, matrices.b)


@pytest.mark.parametrize(
    ("ggml_type", "rank"),
    [(GGMLQuantizationType.BF16, 3), (GGMLQuantizationType.Q8_0, 32), (GGMLQuantizationType.Q4_1, 64)],
)
def test_packed_gguf(ggml_type: GGMLQuantizationType, rank: int, tmp_path: Path) -> None:
    tensors = gguf_tensors(small_adapter(rank))
    packed = {name: gguf.quantize(tensor, ggml_type) for name, tensor in tensors.items()}
    path = write_adapter(tmp_path / "packed.gguf", packed, dict.fromkeys(packed, ggml_type))
    (matrices,) = load_lora(path, CONFIG).modules.values()
    for half, actual, scale in ((A, matrices.a, 1), (B, matrices.b, np.float32(4 / rank))):
        expected = gguf.dequantize(gguf.quantize(small_adapter(rank)[half].numpy(), ggml_type), ggml_type)
        np.testing.assert_allclose(actual.numpy(), expected * scale, rtol=1e-6)


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 3.0), (2, 1.0), (0.0, 1.0), (..., 1.0)])
def test_alpha_in_gguf(alpha: Any, scale: float, tmp_path: Path) -> None:
    """Like llama.cpp, take a missing alpha, or 0, as a scale of 1."""
    path = write_adapter(tmp_path / "a.gguf", gguf_tensors(small_adapter()), **{"adapter.lora.alpha": alpha})
    (matrices,) = load_lora(path, CONFIG).modules.values()
    assert torch.equal(matrices.b, small_adapter()[B] * scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.type": "model"}, "general.type: must be 'adapter', not 'model'"),
        ({"adapter.type": "cvec"}, "adapter.type: must be 'lora', not 'cvec'"),
        ({"arch": "gemma"}, "general.architecture: is 'gemma', but the model's is 'llama'"),
        ({"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha: must be a number from 0"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, r"adapter.alora.invocation_tokens: activated LoRA \(aLoRA\)"),
    ],
)
def test_gguf_metadata_that_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "odd.gguf", gguf_tensors(small_adapter()), **changes)
    with pytest.raises(ValueError, match=rf"odd\.gguf: {message}"):
        load_lora(path, CONFIG)


GGUF_A, GGUF_B = "blk.1.attn_k.weight.lora_a", "blk.1.attn_k.weight.lora_b"
ONES = np.ones((2, 32), dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({GGUF_A: None}, f"{GGUF_B}: has no lora_A beside it"),
        ({GGUF_A: ONES.T.copy()}, rf"{GGUF_A}: has shape \(32, 2\), but the model needs \(r, 32\)"),
        ({GGUF_A: ONES.astype(np.int32)}, f"{GGUF_A}: .*I32"),
        ({"blk.2.attn_q.weight.lora_a": ONES}, "blk.2.attn_q.weight.lora_a: there is no layer 2: the model has 2"),
        ({"output.weight.lora_a": ONES}, "output.weight.lora_a: only adapters of self_attn.q_proj, "),
        ({"blk.0.attn_qkv.weight.lora_a": ONES}, "blk.0.attn_qkv.weight.lora_a: has no lora_B beside it"),
        ({"blk.0.attn_q.weight": ONES}, "blk.0.attn_q.weight: is neither lora_a nor lora_b"),
        ({"blk.0.ssm_in.weight.lora_a": ONES}, "blk.0.ssm_in.weight.lora_a: no supported model has such a tensor"),
    ],
)
def test_gguf_tensors_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (gguf_tensors(small_adapter()) | changes).items() if tensor is not None}
    path = write_adapter(tmp_path / "odd.gguf", tensors)
    with pytest.raises(ValueError, match=rf"odd\.gguf: {message}"):
        load_lora(path, CONFIG)


# Damaged files.


def damaged(data: bytes) -> Iterator[bytes]:
    """Yield truncated copies, and copies with changed bytes among the first 500, where the header is."""
    yield from (data[:length] for length in range(0, len(data), num_examples(35, 7)))
    rng = np.random.default_rng(0)
    for _ in range(num_examples(100, 600)):
        changed = bytearray(data)
        for position in rng.integers(0, 500, rng.integers(1, 4)):
            changed[position] = rng.choice([0, 1, 9, 127, 255, int(rng.integers(256))])
        yield bytes(changed)


@pytest.mark.drawn
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_damaged_files(form: str, tmp_path: Path) -> None:
    """Each is refused with a ValueError that names the file, or gives matrices that fit the model; most are refused."""
    path = adapter = tmp_path / "adapter.gguf"
    if form == "gguf":
        write_adapter(path, gguf_tensors(small_adapter()))
    else:
        adapter = write_folder(tmp_path)
        path = adapter / "adapter_model.safetensors"
    files = list(damaged(path.read_bytes()))
    num_refused = 0
    for data in files:
        path.write_bytes(data)
        if (refusal := refusal_of(adapter)) is not None:
            num_refused += 1
            assert path.name in refusal
    assert num_refused > len(files) / 3


def test_headers_that_lie(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    for shape, offsets in (([2**40, 32], [0, 2**47]), ([2, 32], [0, 2**40]), ([2**62, 32], [0, 256]), ([-2], [0, 8])):
        header = json.dumps({A: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        for size in (len(header), 2**63, 2**30):
            path.write_bytes(size.to_bytes(8, "little") + header + bytes(256))
            with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a valid safetensors file"):
                load_lora(folder, CONFIG)


FORMS = ["safetensors", "gguf"]


def write(form: str, folder: Path, tensors: Tensors) -> tuple[Path, Path]:
    """Write an adapter. Return its path and that of the file with its tensors."""
    if form == "gguf":
        path = write_adapter(folder / "adapter.gguf", gguf_tensors(tensors))
        return path, path
    rank = next(iter(tensors.values())).shape[0]
    return write_folder(folder / "adapter", tensors, r=rank), folder / "adapter" / "adapter_model.safetensors"


# Too large.


def test_a_rank_of_a_billion(tmp_path: Path) -> None:
    """The file is as long as its header says, and holds only zeros."""
    rank = 10**9
    sizes = [128 * rank, 192 * rank]
    header = {
        A: {"dtype": "F32", "shape": [rank, 32], "data_offsets": [0, sizes[0]]},
        B: {"dtype": "F32", "shape": [48, rank], "data_offsets": [sizes[0], sum(sizes)]},
    }
    folder = write_folder(tmp_path, r=rank)
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "adapter_model.safetensors", 8 + len(text) + sum(sizes))
    with pytest.raises(ValueError, match="rank 1000000000 is more than the 16 of --max-lora-rank"):
        load_lora(folder, CONFIG, 16)
    with pytest.raises(ValueError, match=r"model\.safetensors: has 320000000\d+ bytes, but adapters of this model"):
        load_lora(folder, CONFIG)


@pytest.mark.parametrize("form", FORMS)
def test_the_rank_is_checked_before_the_numbers(form: str, tmp_path: Path) -> None:
    whole = small_adapter(3)
    adapter, path = write(form, tmp_path, whole | {A: whole[A] * torch.nan})
    with pytest.raises(ValueError, match=rf"{path.name}: rank 3 is more than the 2 of --max-lora-rank"):
        load_lora(adapter, CONFIG, 2)
    for max_rank in (3, None):
        with pytest.raises(ValueError, match="holds numbers that are infinite or not a number"):
            load_lora(adapter, CONFIG, max_rank)
    adapter, _ = write(form, tmp_path, whole)
    (matrices,) = load_lora(adapter, CONFIG, 3).modules.values()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # it may change afterwards
    assert torch.equal(matrices.a, whole[A])
    torch.testing.assert_close(matrices.b, whole[B] * (4 / 3))


@pytest.mark.parametrize("max_rank", [200, None])
def test_the_largest_adapter_is_read(max_rank: int | None, tmp_path: Path) -> None:
    """The limit on the file's size is that of an adapter of all modules in float64, and 4 MiB for the header."""
    config = llama_config(**FIELDS | {"hidden_size": 320, "intermediate_size": 400})
    tensors: Tensors = {}
    for name in MODULES:
        rows, columns = module_shapes(config, 0)[name.split(".", 3)[3]]
        rank = max_rank or min(rows, columns)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, columns, dtype=torch.float64)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, rank, dtype=torch.float64)
    folder = write_folder(tmp_path, tensors, r=None)
    assert (folder / "adapter_model.safetensors").stat().st_size > 2**22
    assert len(load_lora(folder, config, max_rank).modules) == len(MODULES)

    largest = 2**22 + sum(tensor.nbytes for tensor in tensors.values())
    small = {GGUF_A: np.ones((2, 320), dtype=np.float32), GGUF_B: np.ones((48, 2), dtype=np.float32)}
    path = write_adapter(tmp_path / "adapter.gguf", small)
    os.truncate(path, largest)
    load_lora(path, config, max_rank)
    os.truncate(path, largest + 1)
    with pytest.raises(ValueError, match=rf"has {largest + 1} bytes, but adapters of this model at most {largest}"):
        load_lora(path, config, max_rank)


def test_long_headers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file(small_adapter(), folder / "adapter_model.safetensors", {"text": "x" * 2**22})
    assert "; at most 4194304 are allowed" in str(refusal_of(folder))
    tensors = gguf_tensors(small_adapter())
    path = write_adapter(tmp_path / "a.gguf", tensors, **{"general.description": "x" * 2**22})
    assert "string 0 is longer than the rest: the header may only reach byte 4194304" in str(refusal_of(path))


def test_long_names_make_no_long_messages(tmp_path: Path) -> None:
    name = "blk." + "x" * 10**6
    folder = write_folder(tmp_path, small_adapter() | {name: torch.ones(1)})
    path = write_adapter(tmp_path / "a.gguf", {"blk.short": np.ones(4, dtype=np.float32)})
    short_name, long_name = (struct.pack("<Q", len(text)) + text.encode() for text in ("blk.short", name))
    path.write_bytes(path.read_bytes().replace(short_name, long_name) + bytes(100))
    for adapter in (folder, path):
        refusal = refusal_of(adapter)
        assert refusal is not None
        assert "blk.xxx" in refusal
        assert len(refusal) < 600


# Not regular files.


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapter.gguf"])
def test_paths_that_are_not_regular_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they block if they become pipes between the check and the opening."""
    folder = write_folder(tmp_path)
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for message in ("no such adapter|in this folder", "is not a regular file"):
        with pytest.raises(ValueError, match=message):
            load_lora(path if name.endswith("gguf") else folder, CONFIG)
        monkeypatch.setattr(Path, "is_dir", lambda self: self == folder)
        monkeypatch.setattr(Path, "is_file", lambda self: self != folder)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_shapes_of_latent_attention(q_lora_rank: int | None, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": 8, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"num_hidden_layers": 1, "first_k_dense_replace": 1, "q_lora_rank": q_lora_rank, "vocab_size": 64}
    values = DeepseekV2Config(**sizes)
    values.save_pretrained(tmp_path)
    layer: Any = DeepseekV2ForCausalLM(values).model.layers[0]
    expected = {
        name: tuple(module.weight.shape) for name, module in layer.named_modules() if isinstance(module, Linear)
    }
    del expected["self_attn.kv_b_proj"]  # becomes a part of others
    assert module_shapes(load_model_config(tmp_path), 0) == expected
