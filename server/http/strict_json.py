"""The parser of JSON request bodies.

It is stricter than most JSON parsers: UTF-8 only, no NaN or Infinity, no numbers beyond float64, no lone surrogates, an
object at the top level, and limits on depth, fields and number of values. The last value of a repeated key counts.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from server.http.errors import InvalidJSONError, InvalidValueError
from server.http.validation import format_path

MAX_DEPTH = 100
MAX_NODES = 100_000  # arrays, objects and keys
MAX_FIELDS = 1000  # of the object at the top level; each that is unknown is looked at and named
MAX_ELEMENTS = 1 << 20  # of all arrays and objects together; a prompt may have several hundred thousand token ids
MAX_UNCHECKED = MAX_NODES  # bytes of a body that cannot exceed the limits on nodes and elements
CONTAINERS = (dict, list)
MAX_SEARCHED = 1 << 20  # bytes of an invalid body that is searched for lone surrogates

_MALFORMED = re.compile(r"JSON is malformed: (?P<problem>.+) \(byte (?P<byte>\d+)\)")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a body.

    Raises:
        InvalidJSONError: the body is not valid JSON, or exceeds a limit.
        InvalidValueError: a string contains a lone surrogate; `param` is its path.
    """
    if len(body) > MAX_UNCHECKED:
        check_size(body)
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidJSONError("the body is not valid UTF-8.") from None
    except RecursionError:
        raise InvalidJSONError(f"the body is nested more than {MAX_DEPTH} levels deep.") from None
    except msgspec.DecodeError as error:
        check_surrogates(body)
        raise InvalidJSONError(f"the body is not valid JSON: {describe_error(str(error), body)}.") from None
    if not isinstance(value, dict):
        raise InvalidJSONError("the body must be a JSON object.")
    if len(value) > MAX_FIELDS:
        raise InvalidJSONError(f"the body has more than {MAX_FIELDS} fields.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise InvalidJSONError(f"the body is nested more than {MAX_DEPTH} levels deep.")
    return value


def describe_error(error: str, body: bytes) -> str:
    """Return msgspec's error about a body in words, with the line and the column, which count from 1."""
    match = _MALFORMED.fullmatch(error)
    if match is None:
        return "a number is out of range" if "out of range" in error else f"it ends too early, {position(body, None)}"
    return f"{match['problem']}, {position(body, int(match['byte']))}"


def position(body: bytes, offset: int | None) -> str:
    """Return the line and the column of a byte, or of the end."""
    before = body[:offset]
    line, start = before.count(b"\n") + 1, before.rfind(b"\n") + 1
    return f"line {line} column {len(before[start:].decode(errors='replace')) + 1}"


def check_size(body: bytes) -> None:
    """Raise InvalidJSONError if parsing the body would block other requests for too long."""
    if (problem := describe_size([body])) is not None:
        raise InvalidJSONError(f"the body has {problem}.")


def describe_size(texts: Sequence[bytes]) -> str | None:
    """Return which limit several JSON texts exceed together, or None if they exceed none."""
    if sum(map(_count_nodes, texts)) <= MAX_NODES and sum(map(_count_elements, texts)) <= MAX_ELEMENTS:
        return None  # even with those inside of strings
    num_nodes = num_elements = 0
    for text in map(_outside_strings, texts):
        num_nodes += _count_nodes(text)
        num_elements += _count_elements(text)
        if num_nodes > MAX_NODES:
            return f"more than {MAX_NODES} arrays, objects and keys"
        if num_elements > MAX_ELEMENTS:
            return f"arrays with more than {MAX_ELEMENTS} elements"
    return None


def _outside_strings(text: bytes) -> bytes:
    """Return a JSON text without its strings. The last one may be unterminated.

    Before each string is a bracket, a comma or a colon. So no more strings are removed than the limits allow of these.
    """
    pieces = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 2 * (MAX_NODES + MAX_ELEMENTS + 1))
    return b"".join(pieces[::2])


def _count_elements(body: bytes) -> int:
    """Return the number of elements, not counting the first of each array or object."""
    return body.count(b",")


def _count_nodes(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{") + body.count(b":")


def is_deeper(value: object, limit: int) -> bool:
    """Return whether arrays and objects are nested more than `limit` levels deep."""
    level = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent) if type(child) in CONTAINERS]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_surrogates(body: bytes) -> None:
    """Raise InvalidValueError with the path of a string that contains a lone surrogate.

    It only improves the message: the body is already known to be invalid.
    """
    if len(body) > MAX_SEARCHED or not _SURROGATE_ESCAPE.search(body):
        return
    try:
        path = find_surrogate(json.loads(body))
    except (ValueError, RecursionError):
        return
    if path is not None:
        param = format_path(path)
        raise InvalidValueError(f"Invalid '{param}': the string contains a lone surrogate.", param=param or None)


def find_surrogate(value: object) -> list[int | str] | None:
    """Return the path of the first string that UTF-8 cannot encode, or of the object that has it as a key."""
    if isinstance(value, str):
        return None if _is_encodable(value) else []
    if isinstance(value, dict) and not all(map(_is_encodable, value)):
        return []
    items: Iterable[tuple[int | str, object]] = value.items() if isinstance(value, dict) else ()
    for key, child in enumerate(value) if isinstance(value, list) else items:
        if (path := find_surrogate(child)) is not None:
            return [key, *path]
    return None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
