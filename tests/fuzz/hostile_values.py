"""Values that no file should have, put in place of each number and list of a model's metadata."""

import json
import math
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.shared.gguf import UINT64, GGUFHeader, _Reader

NUMBERS: tuple[int | float, ...] = (*(0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1), *(math.nan, math.inf, 1e308))
JSON_VALUES: tuple[Any, ...] = (*NUMBERS, [], "", None, True, [[1, [2]], {"a": [3]}], [2**31 - 1] * 3)

UINT8, INT64, FLOAT64, BOOL, STRING, ARRAY = 0, 11, 12, 7, 8, 9


def encode_gguf(value_type: int, data: bytes) -> bytes:
    """Return a value of GGUF metadata, with the number of its type."""
    return struct.pack("<I", value_type) + data


GGUF_VALUES: dict[str, bytes] = {
    **{
        repr(number): encode_gguf(INT64, struct.pack("<q", number))
        if isinstance(number, int)
        else encode_gguf(FLOAT64, struct.pack("<d", number))
        for number in NUMBERS
    },
    "[]": encode_gguf(ARRAY, struct.pack("<IQ", INT64, 0)),
    '""': encode_gguf(STRING, struct.pack("<Q", 0)),
    "true": encode_gguf(BOOL, b"\1"),
    "nested": encode_gguf(ARRAY, struct.pack("<IQIQ", ARRAY, 1, UINT8, 0)),
    "[2**31 - 1] * 3": encode_gguf(ARRAY, struct.pack("<IQqqq", INT64, 3, *[2**31 - 1] * 3)),
    "strings": encode_gguf(ARRAY, struct.pack("<IQQQ", STRING, 2, 0, 0)),
    "2**60 numbers": encode_gguf(ARRAY, struct.pack("<IQ", INT64, 2**60)),
    "2**60 strings": encode_gguf(ARRAY, struct.pack("<IQ", STRING, 2**60)),
}
MISSING = "missing"


class _PlaceReader(_Reader):
    """Notes where the values of metadata are, with their types, and where all numbers of the header are."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data, len(data), Path("model.gguf"))
        self.spans: dict[str, tuple[int, int]] = {}  # key -> start and end, with the type
        self.numbers_at: list[tuple[int, int]] = []  # position, size

    def value(self, value_type: int, field: str) -> Any:
        start = self.position - 4
        value = super().value(value_type, field)
        self.spans[field] = (start, self.position)
        return value

    def number(self, layout: struct.Struct, field: str) -> Any:
        value = super().number(layout, field)
        self.numbers_at.append((self.position - layout.size, layout.size))
        return value

    def strings(self, count: int, field: str) -> list[str]:
        self.numbers_at.append((self.position, 8))  # the length of the first one
        return super().strings(count, field)

    def numbers(self, code: str, count: int, field: str) -> "array[Any]":
        values = super().numbers(code, count, field)
        self.numbers_at += [(self.position - values.itemsize, values.itemsize)] if count else []
        return values


class GGUFImage:
    """A GGUF file of which one value of the metadata can be replaced."""

    def __init__(self, data: bytes) -> None:
        reader = _PlaceReader(bytearray(data))
        header = GGUFHeader.__new__(GGUFHeader)
        header.path, header.metadata, header.tensors, header._file_size = Path("model.gguf"), {}, {}, len(data)
        header._read(reader)
        self.metadata = header.metadata
        self.data, self.numbers_at, self.end = data, reader.numbers_at, reader.position
        self._spans = reader.spans
        self._first_tensor = min(tensor.offset for tensor in header.tensors.values())

    def keys(self) -> list[str]:
        """Return the keys of numbers, of lists and of booleans."""
        return [key for key, value in self.metadata.items() if isinstance(value, int | float | list | array)]

    def with_value(self, key: str, value: bytes | None) -> bytes:
        """Return the file with another value, in addition if it lacks the key; None: without the key."""
        name = struct.pack("<Q", len(key.encode())) + key.encode()
        last = max(end for _, end in self._spans.values())
        start, end = self._spans.get(key, (last, last))
        is_there, is_wanted = key in self._spans, value is not None
        start -= len(name) if is_there else 0
        counts = bytearray(self.data[:start])
        (num_keys,) = UINT64.unpack_from(counts, 16)
        UINT64.pack_into(counts, 16, num_keys + is_wanted - is_there)
        head = bytes(counts) + (name + value if value is not None else b"") + self.data[end : self.end]
        alignment = 32
        return head + bytes(-len(head) % alignment) + self.data[self._first_tensor :]


def json_places(text: bytes, num_of_each: int = 2) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each number, boolean, null and container of a JSON text; of long containers only some."""

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if path and not isinstance(value, str):
            yield path
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        for key in keys if len(keys) <= 64 else keys[:num_of_each]:
            yield from places(value[key], (*path, key))

    return places(json.loads(text), ())


def with_json_value(text: bytes, path: tuple[Any, ...], value: Any) -> bytes:
    """Return a JSON text with another value at a path, in addition if there is none."""
    values = json.loads(text)
    container = values
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    return json.dumps(values).encode()
