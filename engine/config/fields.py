"""Typed, range-checked access to model metadata, from GGUF or JSON, and the JSON files that come with models."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_INT = 2**31 - 1
MAX_FLOAT = 1e30
MAX_FACTOR = 1e31  # of frequencies: files have 1e30 for those that do not turn


class Fields:
    """The values of one source of metadata. Null counts as missing; errors (ValueError) name the source and the key."""

    def __init__(
        self,
        source: str,
        values: Mapping[str, Any],
        names: Mapping[str, Sequence[str]] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`names`: other names that a key may have in `values`; `labels`: how errors call a key."""
        self.source = source
        self.values = values
        self.names = names or {}
        self.labels = labels or {}

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """Return the same fields, with values for keys that are missing; null stays null, but for objects."""
        missing = {
            key: value
            for key, value in defaults.items()
            if not any(name in self for name in self._names(key)) or (isinstance(value, dict) and self.get(key) is None)
        }
        return Fields(self.source, {**self.values, **missing}, self.names, self.labels)

    def with_values(self, values: Mapping[str, Any]) -> Fields:
        """Return the same fields, with other values for some keys.

        It takes no longer for more fields: each layer has its own, and a file may have a million keys.
        """
        both: Mapping[str, Any] = ChainMap(dict(values), self.values)  # type: ignore[arg-type]  # it is not written to
        return Fields(self.source, both, self.names, self.labels)

    def _names(self, key: str) -> Sequence[str]:
        return (*self.names.get(key, ()), key)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, key: str) -> Any:
        """Return the value of a key under any of its names; None if it is missing or null."""
        found = (self.values.get(name) for name in self._names(key))
        return next((value for value in found if value is not None), None)

    def error(self, key: str, problem: str) -> ValueError:
        name = next((name for name in self._names(key) if self.values.get(name) is not None), key)
        return ValueError(f"{self.source}: {self.labels.get(key, name)}: {problem}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INT) -> int:
        value = self.optional_integer(key, minimum=minimum, maximum=maximum)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default

    def optional_integer(self, key: str, *, minimum: int = 1, maximum: int = MAX_INT) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"must be an integer from {minimum} to {maximum}, not {shown(value)}")
        return value

    def integers(self, key: str, count: int, default: int | None = None, *, minimum: int = 1) -> list[int]:
        """Return `count` integers: those of a list, or one that holds for all."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.integer(key, default, minimum=minimum)] * count
        if len(value) != count or not all(type(one) is int and minimum <= one <= MAX_INT for one in value):
            raise self.error(key, f"must be {count} integers of at least {minimum}, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None, *, zero: bool = True) -> float:
        value = self.optional_number(key, zero=zero)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default

    def optional_number(self, key: str, *, maximum: float = MAX_FLOAT, zero: bool = True) -> float | None:
        """Return a number from 0 to `maximum` as a float, None if it is missing. 0 itself is allowed only if `zero`."""
        value = self.get(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= maximum or (value == 0 and not zero):
            bounds = f"{'from' if zero else 'above'} 0, at most {maximum:g}"
            raise self.error(key, f"must be a number {bounds}, not {shown(value)}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of `count` positive numbers."""
        value = self.get(key)
        is_list = isinstance(value, list) and len(value) == count
        if not is_list or not all(type(one) in (int, float) and 0 < one <= MAX_FACTOR for one in value):
            raise self.error(key, f"must be {count} positive numbers, not {shown(value)}")
        return tuple(map(float, value))

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {shown(value)}")
        return value

    def string(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {shown(value)}")
        return value

    def nested(self, key: str) -> Fields | None:
        """Return the fields of an object; None if it is missing or empty."""
        value = self.get(key)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, not {shown(value)}")
        return Fields(f"{self.source}: {self.labels.get(key, key)}", value)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Return the token ids of a field that holds one id or a list of ids, all below `vocab_size`."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self.error(key, f"must be token ids below {vocab_size}, not {shown(value)}")
        return tuple(ids)


def shown(value: object) -> str:
    """Format a value for an error message, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# Files, which may not be larger or deeper, or have longer numbers, than any real one.

MAX_BYTES = 16 << 20  # the largest tokenizer_config.json has 1 MB
MAX_INDEX_BYTES = 64 << 20  # of an index of safetensors files; those of a trillion parameters have 20 MB
MAX_DEPTH = 100
MAX_DIGITS = 40  # tokenizer_config.json has model_max_length 10**30


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError with its path if it is none, and OSError."""
    with path.open("rb") as file:
        return parse_json_object(path, file.read(max_bytes + 1), max_bytes)


def parse_json_object(path: Path, data: bytes | bytearray, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in the content of a JSON file; `path` is for messages. Raises ValueError if it is none."""
    try:
        if len(data) > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")
        value = json.loads(data, parse_int=_integer)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (more than {MAX_DEPTH} levels)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _check_depth(value: object) -> None:
    """Raise RecursionError if a value has too many levels for what walks over it later."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        parents = [each for each in level if isinstance(each, dict | list)]
        if not parents:
            return
        level = [child for each in parents for child in (each.values() if isinstance(each, dict) else each)]
    raise RecursionError
