"""Other values of a model's metadata that a file might well have: each is fine by itself, but may not fit the rest."""

import struct
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from engine.config.decoder import ACTIVATIONS
from engine.config.families import FAMILIES
from engine.config.rope import FULL, SLIDING
from tests.fuzz.hostile_values import ARRAY, BOOL, STRING, encode_gguf

HUGE = (2**20, 2**31 - 1)
FLOATS = (0.0, -1.0, 1e-6, 0.5, 1.0, 1e4, 1e30)
NAMES: dict[str, tuple[str, ...]] = {  # the last part of a key -> values
    "hidden_act": tuple(ACTIVATIONS),
    "hidden_activation": tuple(ACTIVATIONS),
    "rope_type": ("default", "linear", "llama3", "yarn", "longrope", "proportional", "dynamic"),
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "position_embedding_type": ("rope", "nope"),
    "model_type": tuple(family.model_type for family in FAMILIES),
    "type": ("none", "linear", "yarn", "longrope"),
}
ELEMENTS: dict[str, tuple[Any, ...]] = {  # of lists with an element for each layer
    "layer_types": (FULL, SLIDING),
    "mlp_layer_types": ("dense", "sparse"),
    "sliding_window_pattern": (True, False),
    "no_rope_layers": (0, 1),
}


def numbers_of(value: Any) -> set[int]:
    """Return all integers of a nested value that may be sizes."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()))
    if isinstance(value, list | array):
        return set().union(*map(numbers_of, list(value)[:64]))
    return {value} if type(value) is int and 0 < value <= 4096 else set()


def other_values(key: str, value: Any, numbers: Iterable[int], num_layers: int) -> Iterator[Any]:
    """Yield other values for a key, which may have none (None): of its type, of others, and lists for all layers.

    `numbers` are those of the whole file. A list has another value for the last layer, or for the last half of them.
    """
    name = key.rpartition(".")[2]
    if name in ELEMENTS:
        yield from ([element] * num_layers for element in ELEMENTS[name])
        yield from ([*[first] * (num_layers - 1), last] for first, last in _pairs(ELEMENTS[name]))
        yield from (
            [*[first] * (num_layers // 2), *[last] * (num_layers - num_layers // 2)]
            for first, last in _pairs(ELEMENTS[name])
        )
    if name in NAMES:
        yield from NAMES[name]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | None):
        others = [*_near(value or 1), *sorted(numbers)]
        yield from others
        yield from (-1, 0, *HUGE)
        for other in sorted({*_near(value or 1)} - {0, value or 1}):
            yield [value or 1] * (num_layers - 1) + [other]
            yield [value or 1] * (num_layers // 2) + [other] * (num_layers - num_layers // 2)
    elif isinstance(value, float):
        yield from (2 * value, value / 2, *FLOATS)
    elif isinstance(value, list | array):
        yield from _other_lists(list(value))
    if value is None:
        yield from (True, False, *FLOATS)
    yield from ("full_attention", [], {}, None)


def _near(number: int) -> list[int]:
    return [number - 1, number + 1, 2 * number, number // 2, 3 * number, 4 * number, 1, 2]


def _pairs(elements: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return [(first, last) for first in elements for last in elements if first != last]


def _other_lists(value: list[Any]) -> Iterator[list[Any]]:
    yield from (value[:-1], [*value, *value[-1:]], value[::-1], value[:1] * len(value))
    for index in range(min(len(value), 8)):
        for other in dict.fromkeys(value[:8]):
            yield [*value[:index], other, *value[index + 1 :]]
        if isinstance(value[index], int | float):
            yield from ([*value[:index], other, *value[index + 1 :]] for other in (0, -1, 2 * value[index], 2**31 - 1))


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
        case list() if value and (elements := [encode(element) for element in value])[0] is not None:
            types = {element[:4] if element is not None else b"" for element in elements}
            if len(types) == 1:
                data = b"".join(element[4:] for element in elements if element is not None)
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
