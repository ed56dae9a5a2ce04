"""Paths, fingerprints and exceptions of `load_lora`, for adapters in both formats."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.lora.reader import load_lora
from engine.weights.files import RegularFile
from tests.support.lora_files import CONFIG, PEFT_WARNINGS, A, B, Tensors, small_adapter, write_folder

pytestmark = PEFT_WARNINGS


def test_fingerprints_name_the_numbers(tmp_path: Path) -> None:
    tensors = small_adapter()
    one_bit = tensors[A].clone()
    one_bit.view(torch.int32)[1, 3] ^= 1
    other_module = {name.replace("k_proj", "v_proj"): tensor.clone() for name, tensor in tensors.items()}
    variants: list[tuple[Tensors, dict[str, Any]]] = [
        (tensors, {}),
        (tensors, {"lora_alpha": 5}),
        (tensors, {"use_rslora": True}),
        (tensors | {A: one_bit}, {}),
        (other_module, {}),
        (tensors | other_module, {}),
        ({A: tensors[A][:1], B: tensors[B][:, :1].contiguous()}, {"r": 1}),
    ]
    fingerprints = [
        load_lora(write_folder(tmp_path / str(index), variant, **changes), CONFIG).fingerprint
        for index, (variant, changes) in enumerate(variants)
    ]
    assert len(set(fingerprints)) == len(variants)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in fingerprints)
    half = load_lora(write_folder(tmp_path / "half", {A: tensors[A], B: tensors[B] * 2}, lora_alpha=2), CONFIG)
    assert half.fingerprint == fingerprints[0]  # the same matrices once they are scaled
    assert load_lora(tmp_path / "0", CONFIG).fingerprint == fingerprints[0]


@pytest.mark.parametrize("path", ["nowhere", "x" * 300, "a\0b"])
def test_no_such_file(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such adapter \(expected a GGUF file, or a folder with|cannot be read"):
        load_lora(tmp_path / path, CONFIG)


def test_neither_gguf_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a GGUF file"):
        load_lora(write_folder(tmp_path) / "adapter_model.safetensors", CONFIG)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, RecursionError, OverflowError, KeyError, OSError])
def test_other_exceptions(error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error("deep inside")

    folder = write_folder(tmp_path)
    monkeypatch.setattr(RegularFile, "read", fail)
    with pytest.raises(ValueError, match=r"cannot be read \(.*deep inside"):
        load_lora(folder, CONFIG)
