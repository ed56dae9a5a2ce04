"""The GGUF file format: a model's metadata and the directory of its tensors, memory-mapped.

Layout, all little-endian: header (magic, version, counts), key-value pairs, tensor directory, aligned tensor data.
Versions 2 and 3 are supported (specification: docs/gguf.md of ggml). The metadata is read in bulk on opening, and every
length is checked against the size of the file before it is used. Only the standard library is imported, because the API
process reads its tokenizer from here too.

A large model may be split over files called NAME-00001-of-00003.gguf and so on, as llama-gguf-split of llama.cpp does.
The first holds the metadata, and each holds a directory of its own tensors.
"""

import mmap
import re
import struct
from array import array
from math import prod
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Any, NamedTuple, Self

from engine.shared.ggml import GGML_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_ENTRIES = 1 << 16  # tensors, and keys; more are a damaged file
MAX_SHOWN = 200  # characters of a name in an error message
DEFAULT_ALIGNMENT = 32
PART_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

UINT32, UINT64 = Struct("<I"), Struct("<Q")
BOOL, STRING, ARRAY = 7, 8, 9  # value types that need more than a type code

# Value type -> type code of `struct` and `array`. Booleans are stored as bytes.
TYPE_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}


class TensorInfo(NamedTuple):
    """One entry of the tensor directory."""

    name: str
    shape: tuple[int, ...]  # in torch's order: the contiguous dimension is the last
    ggml_type: int  # key of GGML_TYPES
    offset: int  # bytes from the start of the file
    n_bytes: int
    part: int = 0  # number of the file, if the model is split


def short(name: str) -> str:
    """Return a name for an error message, in one line: names in a file can be as long as it, and hold anything."""
    shown = name if name[:MAX_SHOWN].isprintable() else ascii(name[:MAX_SHOWN])  # up to ten characters for each
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."


class _Reader:
    """Reads successive values. Raises ValueError for values that would extend beyond the end of the data."""

    def __init__(self, data: mmap.mmap | bytearray, file_size: int, path: Path) -> None:
        self._data = data
        self._size = len(data)
        whole = self._size >= file_size
        self._end = f"the file ends at byte {file_size}" if whole else f"the header may only reach byte {self._size}"
        self._path = path
        self.position = 0

    def error(self, field: str, problem: str) -> ValueError:
        """Return an error that names the file and the field."""
        return ValueError(f"{self._path}: {short(field)}: {problem}")

    def require(self, num_bytes: int, field: str) -> None:
        """Check that this many bytes are left."""
        if num_bytes > self._size - self.position:
            problem = f"needs {num_bytes} bytes at byte {self.position}, but {self._end}"
            raise self.error(field, problem)

    def number(self, layout: Struct, field: str) -> Any:
        self.require(layout.size, field)
        (value,) = layout.unpack_from(self._data, self.position)
        self.position += layout.size
        return value

    def string(self, field: str) -> str:
        return self.strings(1, field)[0]

    def strings(self, count: int, field: str) -> list[str]:
        """Read `count` strings, in one loop without calls, because a vocabulary has hundreds of thousands."""
        self.require(count * UINT64.size, field)
        data, size, position, unpack = self._data, self._size, self.position, UINT64.unpack_from
        values: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self.error(field, f"string {len(values)} is longer than the rest: {self._end}")
                values.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            raise self.error(field, f"string {len(values)} is not UTF-8") from error
        except struct.error as error:
            raise self.error(field, f"the file ends inside the length of string {len(values)}") from error
        self.position = position
        return values

    def numbers(self, code: str, count: int, field: str) -> "array[Any]":
        values: array[Any] = array(code)
        num_bytes = count * values.itemsize
        self.require(num_bytes, field)
        values.frombytes(self._data[self.position : self.position + num_bytes])
        self.position += num_bytes
        return values

    def value(self, value_type: int, field: str) -> Any:
        if value_type == STRING:
            return self.string(field)
        if value_type == ARRAY:
            return self.array(field)
        if (code := TYPE_CODES.get(value_type)) is None:
            raise self.error(field, f"unknown value type {value_type}")
        value = self.number(Struct(f"<{code}"), field)
        return bool(value) if value_type == BOOL else value

    def array(self, field: str) -> "list[str] | array[Any]":
        value_type, count = self.number(UINT32, field), self.number(UINT64, field)
        if value_type == STRING:
            return self.strings(count, field)
        if (code := TYPE_CODES.get(value_type)) is None:
            raise self.error(field, f"arrays of value type {value_type} are not supported")
        return self.numbers(code, count, field)


class GGUFHeader:
    """The metadata and the tensor directory of a GGUF file of `file_size` bytes; `data` is its beginning or all of it.

    In `metadata`, arrays of strings are lists and arrays of numbers are `array.array`s (booleans are bytes 0 and 1).
    All tensors of the directory lie inside the file.

    Raises:
        ValueError: the file is not GGUF, has an unsupported version, or is truncated or inconsistent.
    """

    def __init__(self, path: Path, data: mmap.mmap | bytearray, file_size: int) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._file_size = file_size
        _check_magic(path, data[: len(MAGIC)])
        self._read(_Reader(data, file_size, path))

    def _read(self, reader: _Reader) -> None:
        num_tensors, num_keys = _read_header(reader)
        for index in range(num_keys):
            key = reader.string(f"name of metadata key {index}")
            if key in self.metadata:
                raise reader.error(key, "the key occurs twice")
            self.metadata[key] = reader.value(reader.number(UINT32, key), key)
        entries = [_read_tensor_entry(reader, index) for index in range(num_tensors)]
        self._locate_tensors(reader, entries)

    def _locate_tensors(self, reader: _Reader, entries: list[TensorInfo]) -> None:
        """Convert offsets from the start of the tensor data (the next aligned byte) to offsets in the file."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise reader.error("general.alignment", f"must be a power of two, not {alignment!r}")
        data_start = -(-reader.position // alignment) * alignment
        for entry in entries:
            tensor = entry._replace(offset=data_start + entry.offset)
            if tensor.name in self.tensors:
                raise reader.error(tensor.name, "the tensor occurs twice")
            if entry.offset % alignment:
                raise reader.error(tensor.name, f"its offset {entry.offset} is not a multiple of {alignment}")
            if (end := tensor.offset + tensor.n_bytes) > self._file_size:
                raise reader.error(tensor.name, f"ends at byte {end}, but the file ends at byte {self._file_size}")
            self.tensors[tensor.name] = tensor


class _MappedFile(GGUFHeader):
    """One memory-mapped file: a model, or a part of one. Raises ValueError or OSError, as `GGUFFile`."""

    def __init__(self, path: Path) -> None:
        self.data = _map(path)
        try:
            super().__init__(path, self.data, len(self.data))
        except BaseException:
            self.data.close()
            raise

    def count(self, key: str, default: int) -> int:
        """Return an integer of the metadata. Raises ValueError if it is something else, or negative."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{self.path}: {key}: must be a number of at least 0, not {short(repr(value))}")
        return value


class GGUFFile:
    """An open GGUF file, memory-mapped, with all other parts of the model if it is split.

    `metadata` is that of the first part, `tensors` are those of all parts.

    Raises:
        ValueError: as `GGUFHeader`; or a part is missing, or is not the one that its name says.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._files: list[_MappedFile] = []
        try:
            self._open(_MappedFile(self.path))
            self.metadata = self._files[0].metadata
            self.tensors = _tensors_of(self._files)
        except BaseException:
            self.close()
            raise

    def _open(self, file: _MappedFile) -> None:
        """Open all parts of the model to which `file` belongs, in their order."""
        self._files.append(file)
        count = file.count("split.count", 1)
        if count <= 1:
            return
        paths = split_paths(self.path)
        if len(paths) != count:
            name = f"...-00001-of-{count:05}.gguf"
            raise ValueError(
                f"{self.path}: split.count: the model has {count} files, so this one must be called {name}"
            )
        self.close()
        self._files = []
        for number, path in enumerate(paths):
            if not path.is_file():
                raise ValueError(f"{path}: the file is missing, one of {count} over which the model is split")
            part = _MappedFile(path)
            self._files.append(part)
            for key, expected in (("split.no", number), ("split.count", count)):
                if (found := part.count(key, 0)) != expected:
                    raise ValueError(f"{path}: {key}: is {found}, but this file must have {expected}, as its name says")

    def tensor_data(self, tensor: TensorInfo) -> memoryview:
        """Return a read-only view of the tensor's bytes in the file. Release it before `close`."""
        return memoryview(self._files[tensor.part].data)[tensor.offset : tensor.offset + tensor.n_bytes]

    def close(self) -> None:
        for file in self._files:
            file.data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def split_paths(path: Path) -> list[Path]:
    """Return the paths of all parts of a model, of which `path` is one by its name; `path` alone if it is none."""
    if not (match := PART_NAME.fullmatch(path.name)):
        return [path]
    count = match["count"]
    return [path.with_name(f"{match['name']}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def _tensors_of(files: list[_MappedFile]) -> dict[str, TensorInfo]:
    """Return the tensors of all parts. Raises ValueError if one occurs twice, or they are not as many as announced."""
    tensors: dict[str, TensorInfo] = {}
    for part, file in enumerate(files):
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise ValueError(f"{file.path}: {short(name)}: the tensor occurs in another part too")
            tensors[name] = tensor._replace(part=part)
    if len(files) > 1 and (num := files[0].count("split.tensors.count", len(tensors))) != len(tensors):
        problem = f"announces {num} tensors, but the {len(files)} files have {len(tensors)}"
        raise ValueError(f"{files[0].path}: split.tensors.count: {problem}")
    return tensors


def _check_magic(path: Path, start: bytes | bytearray) -> None:
    if start != MAGIC:
        raise ValueError(f"{path}: not a GGUF file (it does not begin with {MAGIC.decode()})")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        _check_magic(path, file.read(len(MAGIC)))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(reader: _Reader) -> tuple[int, int]:
    """Read the header and return the numbers of tensors and of metadata keys."""
    reader.position = len(MAGIC)
    version = reader.number(UINT32, "version")
    if version & 0xFFFF == 0:
        raise reader.error("version", "the file is big-endian; only little-endian GGUF files are supported")
    if version not in VERSIONS:
        raise reader.error("version", f"GGUF version {version} is not supported (supported: 2 and 3)")
    return _read_count(reader, "tensor count"), _read_count(reader, "metadata count")


def _read_count(reader: _Reader, field: str) -> int:
    count: int = reader.number(UINT64, field)
    if count > MAX_ENTRIES:
        raise reader.error(field, f"must be at most {MAX_ENTRIES}, not {count}")
    return count


def _read_tensor_entry(reader: _Reader, index: int) -> TensorInfo:
    """Read one entry of the tensor directory, with its offset from the start of the tensor data."""
    name = reader.string(f"name of tensor {index}")
    num_dims = reader.number(UINT32, name)
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.error(name, f"has {num_dims} dimensions, not 1 to {MAX_DIMS}")
    shape = tuple(reversed([reader.number(UINT64, name) for _ in range(num_dims)]))
    type_id = reader.number(UINT32, name)
    if (ggml_type := GGML_TYPES.get(type_id)) is None:
        raise reader.error(name, f"unknown tensor type {type_id}")
    row_size = shape[-1] if shape else 1
    if 0 in shape or row_size % ggml_type.block_size:
        raise reader.error(name, f"shape {shape} is not possible for type {ggml_type.name}")
    n_bytes = prod(shape) // ggml_type.block_size * ggml_type.type_size
    return TensorInfo(name, shape, type_id, reader.number(UINT64, name), n_bytes)


def read_partial_metadata(path: Path, data: bytearray, file_size: int) -> dict[str, Any]:
    """Return the metadata that is complete in `data`, the beginning of a file. Raises ValueError if it is not GGUF."""
    _check_magic(path, data[: len(MAGIC)])
    reader = _Reader(data, file_size, path)
    _, num_keys = _read_header(reader)
    metadata: dict[str, Any] = {}
    try:
        for index in range(num_keys):
            key = reader.string(f"name of metadata key {index}")
            metadata[key] = reader.value(reader.number(UINT32, key), key)
    except ValueError:
        pass  # the data ends here
    return metadata
