"""Descriptions of weight files, compared with what the packages of their formats read and write."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from server.parts.hub.weight_files import WeightFiles, describe_weights
from tests.engine.shared.test_gguf import write_split


def test_a_gguf_file(smollm2_path: Path) -> None:
    tensors = gguf.GGUFReader(smollm2_path).tensors
    weights = describe_weights(smollm2_path)
    assert weights.num_parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert (weights.format, weights.number_format) == ("gguf", "Q4_1")
    assert weights.num_bytes == smollm2_path.stat().st_size


def test_a_gguf_model_in_several_files(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    num_bytes = sum(path.stat().st_size for path in paths)
    for path in paths:
        assert describe_weights(path) == WeightFiles("gguf", num_bytes, 15 * 32, "F32")


def test_safetensors(tmp_path: Path) -> None:
    parts = [{"a": torch.zeros(3, 5, dtype=torch.bfloat16)}, {"b": torch.zeros(7), "c": torch.zeros(())}]
    for number, tensors in enumerate(parts, start=1):
        save_file(tensors, tmp_path / f"model-{number}-of-2.safetensors", metadata={"format": "pt"})
    save_file({"a": torch.zeros(100)}, tmp_path / "consolidated.safetensors")  # a copy in another layout
    weights = describe_weights(tmp_path)
    num_parameters = sum(tensor.numel() for tensors in parts for tensor in tensors.values())
    num_bytes = sum(file.stat().st_size for file in tmp_path.glob("model*"))
    assert weights == WeightFiles("safetensors", num_bytes, num_parameters, "BF16")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert describe_weights(tmp_path) == WeightFiles("safetensors", 0, 0, "")


def test_an_invalid_header(tmp_path: Path) -> None:
    headers = (
        *(b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": [], "shape": [1]}}'),
        b'{"a": {"dtype": "F32", "shape": ["x"]}}',
    )
    for content in (
        *(b"", b"\x02\0\0\0\0\0\0\0{", b"\xff\xff\0\0\0\0\0\0" + 5000 * b"[", b"\x02\0\0\0\0\0\0\0[]"),
        b"\xff\xff\xff\xff\xff\xff\xff\xff{",  # a header longer than memory
        *(len(header).to_bytes(8, "little") + header for header in headers),
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            describe_weights(tmp_path)


def test_a_long_header(tmp_path: Path) -> None:
    """Other JSON files are not as long."""
    header = b'{"a": {"dtype": "F32", "shape": [2]}}'.ljust(17 << 20)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert describe_weights(tmp_path).num_parameters == 2
