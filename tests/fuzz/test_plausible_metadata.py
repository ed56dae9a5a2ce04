"""One value of a model's metadata is replaced with another plausible one, and requests run, under sanitizers.

Each value is fine by itself, but may not fit the rest. Each model answers the same whether its requests run alone or
together, with finite logits, or is refused in one line.
"""

import lzma
import random
import struct
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.conftest import Check
from tests.fuzz.hostile_values import ARRAY, BOOL, STRING, GGUFImage, encode_gguf
from tests.fuzz.test_hostile_metadata import keys_of
from tests.parity.make_fixtures import FIXTURES

NUM_OTHERS = 16  # changes of what all layers have in common
NUM_LISTS = 3  # of each key with an element for each layer
OF_LAYERS = ("head_count", "key_length", "shared", "window")  # in keys of what layers may differ in
HUGE = (2**20, 2**31 - 1)
FLOATS = (0.0, -1.0, 1e-6, 0.5, 1.0, 1e4, 1e30)


def numbers_of(metadata: dict[str, Any]) -> set[int]:
    """Return all integers of a file that may be sizes."""
    lists = [value if isinstance(value, list | array) else [value] for value in metadata.values()]
    return {one for values in lists for one in values[:64] if type(one) is int and 0 < one <= 4096}


def other_values(key: str, value: Any, numbers: Iterable[int], num_layers: int) -> Iterator[Any]:
    """Yield other values for a key, which may have none (None): of its type, of others, and lists for all layers.

    `numbers` are those of the whole file. A list has another value for the last layer, or for the last half of them.
    """
    first, half = value or 1, num_layers // 2
    near: list[Any] = []
    if key.endswith("scaling.type"):
        yield from ("none", "linear", "yarn", "longrope")
    elif isinstance(value, bool):
        near = [not value]
    elif isinstance(value, int | None):
        near = [first - 1, first + 1, 2 * first, first // 2, 3 * first, 4 * first, 1, 2]
        yield from (*sorted(numbers), -1, 0, *HUGE)
    elif isinstance(value, float):
        yield from (2 * value, value / 2, *FLOATS)
    elif isinstance(value, list | array):
        values = list(value)
        yield from (values[:-1], [*values, *values[-1:]], values[::-1], values[:1] * len(values))
        for index in range(min(len(values), 8)):
            others = values[:8]
            others += [0, -1, 2 * values[index], HUGE[1]] if isinstance(values[index], int | float) else []
            yield from ([*values[:index], other, *values[index + 1 :]] for other in dict.fromkeys(others))
    for other in near:
        yield other
        yield [first] * (num_layers - 1) + [other]
        yield [first] * half + [other] * (num_layers - half)
    if value is None:
        yield from (True, False, *FLOATS)
    yield from ("full_attention", None)


def encode(value: Any) -> bytes | None:
    """Return a value as GGUF metadata; None if that has no such value."""
    match value:
        case bool():
            return encode_gguf(BOOL, bytes([value]))
        case int() if 0 <= value < 2**32:
            return encode_gguf(4, struct.pack("<I", value))
        case int():
            return encode_gguf(11, struct.pack("<q", value))
        case float():
            return encode_gguf(6, struct.pack("<f", value))
        case str():
            return encode_gguf(STRING, struct.pack("<Q", len(value)) + value.encode())
        case list() if all(elements := [encode(element) or b"" for element in value]):
            types = {element[:4] for element in elements}
            if len(types) == 1:
                data = b"".join(element[4:] for element in elements)
                return encode_gguf(ARRAY, types.pop() + struct.pack("<Q", len(value)) + data)
    return None


def kind_of(value: Any) -> str:
    """Return a name for values that are likely to have the same effect."""
    match value:
        case list() if len(set(map(repr, value))) > 1:
            return "different elements"
        case int() | float() if not isinstance(value, bool):
            return "negative" if value < 0 else "small" if value < 8 else "huge" if value in HUGE else "large"
    return type(value).__name__


def changes(image: GGUFImage, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a key and another value for each kind of what layers may differ in, and for some of the other kinds."""
    num_layers = image.metadata[f"{image.metadata['general.architecture']}.block_count"]
    numbers = numbers_of(image.metadata)
    found: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
    for key in keys_of(image):
        for value in other_values(key, image.metadata.get(key), numbers, num_layers):
            if value is None or encode(value) is not None:
                found[key, kind_of(value)].append(value)
    rng, num_others = random.Random(name), 0
    for key, kind in rng.sample(list(found), len(found)):
        num_values = NUM_LISTS if kind == "different elements" else 1
        if not any(word in key for word in OF_LAYERS):
            num_others += 1
            num_values = num_others <= NUM_OTHERS
        values = found[key, kind]
        yield from ((key, value) for value in rng.sample(values, min(num_values, len(values))))


@pytest.mark.long
@pytest.mark.checklist("F11")
@pytest.mark.parametrize("name", ["gemma4_e2b", "gpt_oss", "qwen3_moe", "deepseek_v2"])
def test_gguf(sanitized_check: Check, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(lzma.decompress((FIXTURES / f"{name}.gguf.xz").read_bytes()))
    assert sanitized_check(path, name)
    image = GGUFImage(path.read_bytes())
    for key, value in changes(image, name):
        path.write_bytes(image.with_value(key, encode(value)))
        sanitized_check(path, f"{name}: {key} = {value!r}")
