"""The GGUF reader compared with the `gguf` package, and on damaged and malicious files."""

import gc
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.shared.gguf import GGUFFile, read_partial_metadata, split_paths
from tests.support.gguf_files import write_gguf

METADATA: dict[str, Any] = {
    "a.number": 7,
    "a.negative": -3,
    "a.float": 0.5,
    "a.flag": True,
    "a.text": "grüße 😀",
    "a.strings": ["", "a", "é" * 300, "\u2581"],
    "a.integers": [1, 2, 3],
    "a.floats": [0.25, -1.0],
    "a.flags": [True, False],
}


def small_file(path: Path) -> Path:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "token_embd.weight": np.arange(32, dtype=np.float32).reshape(2, 16),
        "blk.0.ffn_up.weight": np.arange(2 * 18, dtype=np.uint8).reshape(2, 18),
        "bias": np.arange(3, dtype=np.float16),
    }
    return write_gguf(path, METADATA, tensors, {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q4_0})


@pytest.fixture(scope="session")
def small_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_file(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def header(num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def tensor(name: str, shape: tuple[int, ...] = (32,), ggml_type: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", ggml_type, offset)


def read(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    with GGUFFile(path) as file:
        return file


def test_metadata_and_tensors(tmp_path: Path) -> None:
    with GGUFFile(small_file(tmp_path / "small.gguf")) as file:
        values = {key: list(value) if isinstance(value, array) else value for key, value in file.metadata.items()}
        assert values == METADATA | {"general.architecture": "llama"}
        assert values["a.flag"] is True
        embedding, packed = file.tensors["token_embd.weight"], file.tensors["blk.0.ffn_up.weight"]
        assert (embedding.shape, embedding.ggml_type, embedding.n_bytes) == ((2, 16), 0, 128)
        assert (packed.shape, packed.ggml_type, packed.n_bytes) == ((2, 32), 2, 36)
        with file.tensor_data(embedding) as data:
            assert np.frombuffer(data, dtype=np.float32).tolist() == list(range(32))
        with file.tensor_data(packed) as data:
            assert bytes(data) == bytes(range(36))
            with pytest.raises(TypeError):
                data[0] = 1


def test_real_file_reads_as_the_gguf_package_does(smollm2_path: Path) -> None:
    expected = gguf.GGUFReader(smollm2_path)
    with GGUFFile(smollm2_path) as file:
        for key, value in file.metadata.items():
            field = expected.fields[key].contents()
            assert (list(value) if isinstance(value, array) else value) == field, key
        assert len(file.metadata) == len([key for key in expected.fields if not key.startswith("GGUF.")])
        for info, tensor in zip(file.tensors.values(), expected.tensors, strict=True):
            assert info.name == tensor.name
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert info.ggml_type == tensor.tensor_type
            assert (info.offset, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_metadata_of_the_beginning(small_bytes: bytes, tmp_path: Path) -> None:
    """Whatever is cut off, the keys before are those of the whole file, and in the end all are there."""
    path = tmp_path / "small.gguf"
    path.write_bytes(small_bytes)
    with GGUFFile(path) as file:
        whole = list(file.metadata.items())
    num_keys: list[int] = []
    for end in range(24, len(small_bytes) + 1, 7):
        metadata = read_partial_metadata(path, bytearray(small_bytes[:end]), len(small_bytes))
        assert list(metadata.items()) == whole[: len(metadata)]
        num_keys.append(len(metadata))
    assert num_keys == sorted(num_keys)
    assert (num_keys[0], num_keys[-1]) == (0, len(whole))
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_partial_metadata(path, bytearray(b"<html>"), 1000)


def test_alignment(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.full(5, ord(name), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "aligned.gguf") as file, file.tensor_data(file.tensors["b"]) as data:
        assert file.tensors["b"].offset % 256 == 0
        assert np.frombuffer(data, dtype=np.float32).tolist() == [ord("b")] * 5


TENSORS = {f"t{number}": np.full((number + 1, 32), number, dtype=np.float32) for number in range(5)}


def write_split(folder: Path, *, small_first_shard: bool = False) -> list[Path]:
    """Write a model of five tensors, two in each file. Returns the paths in order."""
    options: dict[str, Any] = {"split_max_tensors": 2, "small_first_shard": small_first_shard}
    write_gguf(folder / "m.gguf", {"answer": 42}, TENSORS, **options)
    return sorted(folder.glob("m-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_a_split_model(small_first_shard: bool, tmp_path: Path) -> None:
    paths = write_split(tmp_path, small_first_shard=small_first_shard)
    assert len(paths) == 3 + small_first_shard
    assert split_paths(paths[1]) == paths
    for path in paths:  # any of them opens the model
        with GGUFFile(path) as file:
            assert file.metadata["answer"] == 42
            assert set(file.tensors) == set(TENSORS)
            for name, values in TENSORS.items():
                with file.tensor_data(file.tensors[name]) as data:
                    assert np.array_equal(np.frombuffer(data, np.float32).reshape(values.shape), values)


def test_names_of_parts() -> None:
    parts = [Path(f"a/m-0000{number}-of-00002.gguf") for number in (1, 2)]
    assert split_paths(parts[0]) == parts
    for name in ("m.gguf", "m-1-of-2.gguf", "m-00001-of-00002.safetensors"):
        assert split_paths(Path(name)) == [Path(name)]


def _replace(part: int, old: bytes, new: bytes) -> Callable[[list[Path]], object]:
    def damage(paths: list[Path]) -> None:
        data = paths[part - 1].read_bytes()
        assert data.count(old) == 1
        paths[part - 1].write_bytes(data.replace(old, new))

    return damage


SPLIT_COUNT = text("split.count") + struct.pack("<I", 2)
NUM_TENSORS = text("split.tensors.count") + struct.pack("<I", 5)


@pytest.mark.parametrize(
    ("damage", "opened", "message"),  # of the three files
    [
        (
            lambda paths: paths[0].rename(f"{paths[0].parent}/a.gguf"),
            "a",
            "split.count: .* 3 files, so .*1-of-00003.gguf",
        ),
        (lambda paths: paths[2].unlink(), "m-00001-of-00003", "00003-of-00003.gguf: the file is missing"),
        (lambda paths: paths[0].unlink(), "m-00002-of-00003", "00001-of-00003.gguf: the file is missing"),
        (
            lambda paths: paths[2].replace(paths[1]),
            "m-00001-of-00003",
            "2-of-00003.gguf: split.no: is 2, .* must have 1",
        ),
        (_replace(3, SPLIT_COUNT + b"\3", SPLIT_COUNT + b"\4"), "m-00001-of-00003", "3.gguf: split.count: is 4, .* 3"),
        (_replace(1, NUM_TENSORS + b"\5", NUM_TENSORS + b"\6"), "m-00001-of-00003", "announces 6 .* 3 files have 5"),
        (_replace(3, text("t4"), text("t0")), "m-00001-of-00003", "3.gguf: t0: the tensor occurs in another part too"),
        (lambda paths: paths[1].write_bytes(b"GGUF"), "m-00001-of-00003", "m-00002-of-00003.gguf: version"),
    ],
)
def test_split_models_that_are_refused(
    damage: Callable[[list[Path]], object], opened: str, message: str, tmp_path: Path
) -> None:
    damage(write_split(tmp_path))
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / f"{opened}.gguf")


def test_version_2(tmp_path: Path) -> None:
    key = text("answer") + struct.pack("<Ii", 5, 42)
    assert read(tmp_path / "v2.gguf", header(num_keys=1, version=2) + key).metadata == {"answer": 42}


def test_no_warning_when_it_is_not_closed(small_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(small_bytes)
    file = GGUFFile(tmp_path / "small.gguf")
    del file
    gc.collect()


def test_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, engine.shared.gguf; assert not {'torch', 'numpy', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


UINT32, STRING, ARRAY = struct.pack("<I", 4), struct.pack("<I", 8), struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "version: needs 4 bytes"),
        (header(version=1), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(num_keys=1), "metadata key 0"),
        (header(num_keys=2**16), "metadata key 0"),
        (header(num_tensors=2**16), "name of tensor 0"),
        (header(num_keys=2**16 + 1), "metadata count: must be at most 65536, not 65537"),
        (header(num_tensors=2**63), "tensor count: must be at most 65536, not 9223372036854775808"),
        (header(num_keys=1) + struct.pack("<Q", 2**64 - 1) + b"abc", "longer than the rest"),
        (header(num_keys=1) + text("k") + struct.pack("<I", 99), "k: unknown value type 99"),
        (header(num_keys=1) + text("k") + STRING + struct.pack("<Q", 2**62), "k: string 0"),
        (header(num_keys=1) + text("k") + STRING + text(b"\xff"), "k: string 0 is not UTF-8"),
        (header(num_keys=1) + text("k") + ARRAY + UINT32 + struct.pack("<Q", 2**61), "k: needs"),
        (header(num_keys=1) + text("k") + ARRAY + STRING + struct.pack("<Q", 2**61), "k: needs"),
        (header(num_keys=1) + text("k") + ARRAY + ARRAY + struct.pack("<Q", 1), "k: arrays of value type 9"),
        (header(num_keys=1) + text("k") + ARRAY + STRING + struct.pack("<Q", 2) + text("x" * 9), "inside the length"),
        (header(num_keys=2) + (text("k") + UINT32 + bytes(4)) * 2, "k: the key occurs twice"),
        (header(num_keys=1) + text("general.alignment") + UINT32 + struct.pack("<I", 3), "power of two"),
        (header(num_keys=1) + text("general.alignment") + UINT32 + bytes(4), "power of two"),
        (header(1) + tensor("t"), "t: ends at byte"),
        (header(1) + tensor("t", (1,) * 5), "t: has 5 dimensions"),
        (header(1) + tensor("t", ()), "t: has 0 dimensions"),
        (header(1) + tensor("t\n\x1b[2J", ()), r"'t\\n\\x1b\[2J': has 0 dimensions"),
        (header(1) + tensor("t", (0, 32)), "t: shape"),
        (header(1) + tensor("t", (31,), ggml_type=2), "t: shape .* Q4_0"),
        (header(1) + tensor("t", ggml_type=77), "t: unknown tensor type 77"),
        (header(1) + tensor("t", offset=8) + bytes(500), "t: its offset 8"),
        (header(2) + tensor("t") * 2 + bytes(500), "t: the tensor occurs twice"),
    ],
)
def test_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"lying\.gguf: .*{message}"):
        read(tmp_path / "lying.gguf", data)


def test_truncated_anywhere(small_bytes: bytes, tmp_path: Path) -> None:
    """The last tensor is followed by padding, which may be missing. tests/fuzz damages files in other ways."""
    for end in range(0, len(small_bytes) - 31, 8):
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            read(tmp_path / "cut.gguf", small_bytes[:end])
