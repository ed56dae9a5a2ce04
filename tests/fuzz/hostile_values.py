"""Values that no file should have, put in place of each number and list of a model's metadata."""

import json
import lzma
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from engine.shared.gguf import UINT64
from tests.parity.make_fixtures import FIXTURES

NUMBERS: tuple[int | float, ...] = (*(0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1), *(math.nan, math.inf, 1e308))
JSON_VALUES: tuple[Any, ...] = (*NUMBERS, [], "", None, True, [[1, [2]], {"a": [3]}], [2**31 - 1] * 3)

INT64, FLOAT64, BOOL, STRING, ARRAY = 11, 12, 7, 8, 9


def encode(value: Any) -> bytes | None:
    """Return a value of GGUF metadata, with the number of its type; None if there is no such value."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<Iq", INT64, value)
        case float():
            return struct.pack("<Id", FLOAT64, value)
        case str():
            return struct.pack("<IQ", STRING, len(value)) + value.encode()
        case list() if all(elements := [encode(element) or b"" for element in value]):
            types = {element[:4] for element in elements} or {struct.pack("<I", INT64)}
            if len(types) == 1:
                data = b"".join(element[4:] for element in elements)
                return struct.pack("<I4sQ", ARRAY, types.pop(), len(value)) + data
    return None


GGUF_VALUES = {repr(value): encode(value) for value in (*NUMBERS, [], "", True, [2**31 - 1] * 3, ["", ""])}
GGUF_VALUES |= {
    "nested": struct.pack("<IIQIQ", ARRAY, ARRAY, 1, INT64, 0),
    "2**60 numbers": struct.pack("<IIQ", ARRAY, INT64, 2**60),
    "2**60 strings": struct.pack("<IIQ", ARRAY, STRING, 2**60),
    "missing": None,
}


class GGUFImage:
    """The GGUF file of a family, of which one value of the metadata can be replaced."""

    def __init__(self, name: str, path: Path) -> None:
        """Write the file to a path."""
        self.data = lzma.decompress((FIXTURES / f"{name}.gguf.xz").read_bytes())
        path.write_bytes(self.data)
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = [tensor.field for tensor in reader.tensors]
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in fields.items()}
        self._spans = {name: (field.offset, _end(field)) for name, field in fields.items()}
        self._end_of_keys, self.end, self._first_tensor = tensors[0].offset, _end(tensors[-1]), reader.data_offset
        self.numbers_at: list[tuple[int, int]] = []  # position, size; of lists, those of the first elements
        for field in (*reader.fields.values(), *tensors):
            position = field.offset
            for part in field.parts[:9]:
                self.numbers_at += [(position, part.itemsize)] if part.dtype != np.uint8 else []
                position += part.nbytes

    def keys(self) -> list[str]:
        """Return the keys of numbers, of lists and of booleans."""
        return [key for key, value in self.metadata.items() if isinstance(value, int | float | list)]

    def with_value(self, key: str, value: bytes | None) -> bytes:
        """Return the file with another value, in addition if it lacks the key; None: without the key."""
        start, end = self._spans.get(key, (self._end_of_keys,) * 2)
        given = b"" if value is None else struct.pack("<Q", len(key.encode())) + key.encode() + value
        head = bytearray(self.data[:start] + given + self.data[end : self.end])
        UINT64.pack_into(head, 16, UINT64.unpack_from(head, 16)[0] + bool(given) - (key in self._spans))
        return bytes(head) + bytes(-len(head) % 32) + self.data[self._first_tensor :]


def _end(field: gguf.ReaderField) -> int:
    return field.offset + sum(part.nbytes for part in field.parts)


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
