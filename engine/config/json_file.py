"""Read JSON files that come with models: not larger, deeper or with longer numbers than any real one."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20  # the largest tokenizer_config.json has 1 MB
MAX_INDEX_BYTES = 64 << 20  # of an index of safetensors files; those of a trillion parameters have 20 MB
MAX_DEPTH = 100
MAX_DIGITS = 40  # tokenizer_config.json has model_max_length 10**30


def read_json_file(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value in a JSON file. Raises ValueError with its path if it is none, and OSError."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    return parse_json_data(path, data, max_bytes)


def parse_json_data(path: Path, data: bytes | bytearray, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value in the content of a JSON file; `path` is for messages. Raises ValueError."""
    try:
        if len(data) > max_bytes:
            raise ValueError(f"larger than {max_bytes} bytes")
        value = json.loads(data, parse_int=_integer)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (more than {MAX_DEPTH} levels)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return value


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError with its path if it is none, and OSError."""
    return _checked_object(path, read_json_file(path, max_bytes))


def parse_json_object(path: Path, data: bytes | bytearray, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in the content of a JSON file; `path` is for messages. Raises ValueError if it is none."""
    return _checked_object(path, parse_json_data(path, data, max_bytes))


def _checked_object(path: Path, value: Any) -> dict[str, Any]:
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
