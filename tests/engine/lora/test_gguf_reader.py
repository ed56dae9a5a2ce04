"""LoRA adapters in GGUF files, compared with the same ones in PEFT's format, and damaged files of both formats."""

import json
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
from safetensors.torch import load_file

from engine.lora.reader import load_lora
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

pytestmark = PEFT_WARNINGS


def gguf_tensors(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Convert PEFT's tensors as llama.cpp does: with other names, and the rows of q and k in another order."""
    names = {
        "self_attn.q_proj": ("attn_q", FIELDS["num_attention_heads"]),
        "self_attn.k_proj": ("attn_k", FIELDS["num_key_value_heads"]),
        "self_attn.v_proj": ("attn_v", None),
        "self_attn.o_proj": ("attn_output", None),
        "mlp.gate_proj": ("ffn_gate", None),
        "mlp.up_proj": ("ffn_up", None),
        "mlp.down_proj": ("ffn_down", None),
    }
    converted = {}
    for name, tensor in tensors.items():
        layer, part, half = name.removeprefix("base_model.model.model.layers.").split(".", 1)[0], *parts_of(name)
        gguf_name, num_heads = names[part]
        rows = tensor.float().numpy()
        if num_heads and half == "lora_b":
            rows = interleave(rows, num_heads)
        converted[f"blk.{layer}.{gguf_name}.weight.{half}"] = rows
    return converted


def parts_of(name: str) -> tuple[str, str]:
    *_, kind, part, half, _ = name.split(".")
    return f"{kind}.{part}", half.lower()


ADAPTER = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}


def write_adapter(path: Path, tensors: Any, types: Any = None, arch: str = "llama", **changes: Any) -> Path:
    values = {key: value for key, value in {**ADAPTER, **changes}.items() if value is not ...}
    return write_gguf(path, values, tensors, types, arch)


@pytest.fixture(scope="module")
def whole_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter of all modules."""
    folder = tmp_path_factory.mktemp("whole")
    save_adapter(folder, LoraConfig(r=32, lora_alpha=4, target_modules=list(ATTENTION + MLP)))
    return folder


def test_the_same_adapter_in_gguf(whole_adapter: Path, tmp_path: Path) -> None:
    tensors = gguf_tensors(load_file(whole_adapter / "adapter_model.safetensors"))
    expected = load_lora(whole_adapter, CONFIG)
    actual = load_lora(write_adapter(tmp_path / "adapter.gguf", tensors), CONFIG)
    assert sorted(actual.modules) == sorted(MODULES)
    assert actual.fingerprint == expected.fingerprint
    for name, matrices in expected.modules.items():
        assert torch.equal(actual.modules[name].a, matrices.a)
        assert torch.equal(actual.modules[name].b, matrices.b)


def test_names_of_modules_in_gguf() -> None:
    """`gguf_tensors` names all modules as the `gguf` package does."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(1, 1) for name in MODULES}
    assert list(gguf_tensors(tensors)) == [f"{names.get_name(name)}.weight.lora_a" for name in MODULES]


@pytest.mark.parametrize(
    ("ggml_type", "rank"),
    [
        (GGMLQuantizationType.F16, 3),
        (GGMLQuantizationType.BF16, 3),
        (GGMLQuantizationType.Q8_0, 32),
        (GGMLQuantizationType.Q4_1, 64),
        (GGMLQuantizationType.Q5_0, 32),
    ],
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


def test_gguf_for_a_mistral_model(tmp_path: Path) -> None:
    """In GGUF files, the architecture of a Mistral model is called llama."""
    path = write_adapter(tmp_path / "a.gguf", gguf_tensors(small_adapter()))
    load_lora(path, msgspec.structs.replace(CONFIG, architecture="mistral"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.type": ...}, "general.type: must be 'adapter', not 'not named'"),
        ({"general.type": "model"}, "general.type: must be 'adapter', not 'model'"),
        ({"general.type": 3}, "general.type: must be a string, not 3"),
        ({"adapter.type": ...}, "adapter.type: must be 'lora', not 'not named'"),
        ({"adapter.type": "cvec"}, "adapter.type: must be 'lora', not 'cvec'"),
        ({"arch": "gemma"}, "general.architecture: is 'gemma', but the model's is 'llama'"),
        ({"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha: must be a number from 0"),
        ({"adapter.lora.alpha": float("inf")}, "adapter.lora.alpha: must be a number from 0"),
        ({"adapter.lora.alpha": "4"}, "adapter.lora.alpha: must be a number from 0"),
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
        ({GGUF_A: None, GGUF_B: None}, "holds no LoRA matrices"),
        ({GGUF_A: None}, f"{GGUF_B}: has no lora_A beside it"),
        ({GGUF_B: None}, f"{GGUF_A}: has no lora_B beside it"),
        ({GGUF_A: np.ones((3, 32), dtype=np.float32)}, f"{GGUF_B}: has rank 2, but its lora_A has rank 3"),
        ({GGUF_A: ONES.T.copy()}, rf"{GGUF_A}: has shape \(32, 2\), but the model needs \(r, 32\)"),
        ({GGUF_B: ONES}, rf"{GGUF_B}: has shape \(2, 32\), but the model needs \(48, r\)"),
        ({GGUF_A: ONES * np.float32(np.nan)}, f"{GGUF_A}: holds numbers that are infinite or not a number"),
        ({GGUF_A: ONES.astype(np.int32)}, f"{GGUF_A}: .*I32"),
        ({GGUF_A: ONES.astype(np.float64)}, f"{GGUF_A}: .*F64"),
        ({"blk.2.attn_q.weight.lora_a": ONES}, "blk.2.attn_q.weight.lora_a: there is no layer 2: the model has 2"),
        ({"token_embd.weight.lora_a": ONES}, "token_embd.weight.lora_a: only adapters of self_attn.q_proj, "),
        ({"output.weight.lora_a": ONES}, "output.weight.lora_a: only adapters of self_attn.q_proj, "),
        ({"blk.0.attn_norm.weight.lora_a": ONES}, "blk.0.attn_norm.weight.lora_a: only adapters of self_attn.q_proj, "),
        ({"blk.0.attn_q.bias.lora_a": ONES}, "blk.0.attn_q.bias.lora_a: only adapters of self_attn.q_proj, "),
        ({"blk.0.attn_qkv.weight.lora_a": ONES}, "blk.0.attn_qkv.weight.lora_a: has no lora_B beside it"),
        ({"blk.0.attn_norm.weight": ONES[0]}, "blk.0.attn_norm.weight: is neither lora_a nor lora_b"),
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
    yield from (data[:length] for length in range(0, len(data), 7))
    rng = np.random.default_rng(0)
    for _ in range(600):
        changed = bytearray(data)
        for position in rng.integers(0, 500, rng.integers(1, 4)):
            changed[position] = rng.choice([0, 1, 9, 127, 255, int(rng.integers(256))])
        yield bytes(changed)


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_damaged_files(form: str, tmp_path: Path) -> None:
    """Each is refused with a ValueError that names the file, or gives matrices that fit the model; most are refused."""
    if form == "gguf":
        path = adapter = write_adapter(tmp_path / "adapter.gguf", gguf_tensors(small_adapter()))
    else:
        adapter = write_folder(tmp_path)
        path = adapter / "adapter_model.safetensors"
    num_refused = 0
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        if (refusal := refusal_of(adapter)) is not None:
            num_refused += 1
            assert path.name in refusal
    assert num_refused > 300


def test_headers_that_lie(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    for shape, offsets in (([2**40, 32], [0, 2**47]), ([2, 32], [0, 2**40]), ([2**62, 32], [0, 256]), ([-2], [0, 8])):
        header = json.dumps({A: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        for size in (len(header), 2**63, 2**30):
            path.write_bytes(size.to_bytes(8, "little") + header + bytes(256))
            with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a valid safetensors file"):
                load_lora(folder, CONFIG)
