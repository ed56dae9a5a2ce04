"""Mutations of model files: numbers of the header, bytes, lengths, and values of JSON."""

import json
import random
from array import array
from pathlib import Path
from struct import Struct
from typing import Any

from engine.shared.gguf import GGUFHeader, _Reader

# Numbers that counts, sizes, offsets and types are replaced with.
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 65_535, 65_536, 1 << 20, (1 << 24) + 1, (1 << 31) - 1)
LARGE_NUMBERS = (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\0", "é" * 1000, [], {}, [1], {"a": 1}, [[]], [None]),
    *(0, -1, 1, 2, 3, 7, 64, 65_536, 1 << 31, 1 << 40, 1 << 63, 10**30, 0.0, -0.5, 0.5, 1e-300, 1e300, float("nan")),
)


class _RecordingReader(_Reader):
    """Notes where the numbers of a header are."""

    def __init__(self, data: bytearray) -> None:
        super().__init__(data, len(data), Path("model.gguf"))
        self.numbers_at: list[tuple[int, int]] = []  # position, size

    def number(self, layout: Struct, field: str) -> Any:
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


def numbers_of_gguf(data: bytes) -> tuple[list[tuple[int, int]], int]:
    """Return the position and size of each number in the header of a GGUF file, and where the header ends."""
    reader = _RecordingReader(bytearray(data))
    header = GGUFHeader.__new__(GGUFHeader)
    header.path, header.metadata, header.tensors, header._file_size = Path("model.gguf"), {}, {}, len(data)
    header._read(reader)
    return reader.numbers_at, reader.position


def mutate_gguf(data: bytes, numbers: list[tuple[int, int]], header_end: int, rng: random.Random) -> bytes:
    """Change one to three things in the header of a GGUF file, or its length."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.6:
            position, size = rng.choice(numbers)
            old = int.from_bytes(changed[position : position + size], "little")
            new = rng.choice((rng.choice(NUMBERS), rng.choice(LARGE_NUMBERS), old + 1, old - 1, old * 2, old // 2))
            changed[position : position + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        else:
            changed = mutate_bytes(changed, header_end, rng)
    return bytes(changed)


def mutate_bytes(data: bytearray, end: int, rng: random.Random) -> bytearray:
    """Change, insert, remove or cut bytes before `end`."""
    position = rng.randrange(min(end, len(data)) or 1)
    num = rng.choice((1, 1, 2, 4, 8, 100))
    match rng.randrange(5):
        case 0:
            data[position : position + 1] = bytes([data[position] ^ 1 << rng.randrange(8)])
        case 1:
            data[position : position + num] = rng.randbytes(num)
        case 2:
            data[position:position] = rng.randbytes(num)
        case 3:
            del data[position : position + num]
        case _:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data + rng.randbytes(num)
    return data


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or repeat values of a JSON text, or change its bytes."""
    if rng.random() < 0.1:
        return bytes(mutate_bytes(bytearray(data), len(data), rng))
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        _mutate_value(value, rng)
    return json.dumps(value).encode()


def _mutate_value(value: Any, rng: random.Random) -> None:
    places: list[tuple[Any, Any]] = []
    _collect(value, places, rng)
    if not places:
        return
    container, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.25 and isinstance(container, dict):
        container[rng.choice(("x", "", *container))] = container.pop(key)
    elif kind < 0.35 and isinstance(container[key], int | float):
        container[key] = container[key] * rng.choice((-1, 2, 3, 1000)) + rng.choice((-1, 0, 1))
    else:
        container[key] = rng.choice(JSON_VALUES)


def _collect(value: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    """Append all (container, key), of long containers only some."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) <= 50 else rng.sample(keys, 5):
        places.append((value, key))
        _collect(value[key], places, rng)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file: its length, its JSON or its bytes."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return rng.choice((*NUMBERS, *LARGE_NUMBERS, length - 1, length + 1)).to_bytes(8, "little") + data[8:]
    if kind < 0.7:
        header = mutate_json(header, rng)
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + tensors
    return bytes(mutate_bytes(bytearray(data), 8 + length, rng))
