"""Pydantic's errors about a body as OpenAI would describe them: one problem, with a path like `messages[0].content`."""

import re
from collections.abc import Sequence
from typing import Any

from server.http.errors import (
    BadRequestError,
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    UnknownParameterError,
    clip,
)

MAX_ECHO = 64  # characters of a client's value that are repeated in a message

# Beginning of the error types of values of another type -> the expected type, as a phrase with its article.
EXPECTED_TYPES = {
    **{"int": "an integer", "float": "a decimal", "decimal": "a decimal", "bool": "a boolean", "string": "a string"},
    **dict.fromkeys(("list", "tuple", "iterable"), "an array"),
    **dict.fromkeys(("dict", "mapping", "model", "dataclass"), "an object"),
    "none": "null",
}
TYPE_ERROR = re.compile(r"([a-z]+)_(type|parsing|from_float|attributes_type|required)")

# error type -> (is it an upper limit, sign of the limit, key of the limit in `ctx`)
NUMBER_LIMITS = {
    "less_than_equal": (True, "<=", "le"),
    "less_than": (True, "<", "lt"),
    "greater_than_equal": (False, ">=", "ge"),
    "greater_than": (False, ">", "gt"),
}

# error type -> (noun, is it an upper limit)
LENGTH_LIMITS = {
    "string_too_long": ("string", True),
    "string_too_short": ("string", False),
    "too_long": ("array", True),
    "too_short": ("array", False),
}


def from_validation_error(errors: Sequence[dict[str, Any]], body: object) -> BadRequestError:
    """Return the error to report: that of the first invalid field and, among the errors of a union, the deepest.

    `errors` are pydantic's. Their locations start with the source of the value ("body", "path", "query").
    """
    located = [(format_path(resolve_location(error, body)), error) for error in errors]
    first = _field(located[0][0])
    located = [(path, error) for path, error in located if _field(path) == first]
    deepest = max((path for path, _ in located), key=lambda path: path.count(".") + path.count("["))
    return _describe(deepest, [error for path, error in located if path == deepest])


def resolve_location(error: dict[str, Any], body: object) -> list[int | str]:
    """Return the path of an error in the body, without the names of union members that pydantic adds to its location.

    A part of the location that is no key or index of the value there is such a name, except for the last part if a
    field is missing. A part that is a key is a name too, if only the value itself, not its item, has the next part.
    """
    source: str
    parts: list[int | str]
    source, *parts = error["loc"]
    if source != "body":
        return parts
    path: list[int | str] = []
    value: Any = body
    for position, part in enumerate(parts, start=1):
        following = parts[position] if position < len(parts) else None
        if _has_item(value, part) and (_has_item(value[part], following) or not _has_item(value, following)):
            value = value[part]
            path.append(part)
        elif error["type"] == "missing" and position == len(parts):
            path.append(part)
    return path


def format_path(path: Sequence[int | str]) -> str:
    """`["messages", 0, "content"]` -> `messages[0].content`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def json_type(value: object) -> str:
    """Return the JSON type of a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def echo(value: object) -> str:
    """Shorten a client's value, to repeat it in a message."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "..."


def _has_item(value: Any, part: int | str | None) -> bool:
    if isinstance(part, int):
        return isinstance(value, list) and part < len(value)
    return isinstance(value, dict) and part in value


def _field(path: str) -> str:
    return path.replace("[", ".").split(".", 1)[0]


def _describe(path: str, errors: list[dict[str, Any]]) -> BadRequestError:
    """Describe the errors at one path as one problem. A union has several errors; a limit is preferred to a type."""
    expected: dict[str, None] = {}
    for error in errors:
        match = TYPE_ERROR.fullmatch(error["type"])
        phrase = EXPECTED_TYPES.get(match[1]) if match else None
        if phrase is None:
            return _describe_one(path, error)
        expected[phrase] = None
    *others, last = expected
    all_types = f"one of {', '.join(others)} or {last}" if others else last
    return InvalidTypeError(path, all_types, json_type(errors[0]["input"]))


def _describe_one(path: str, error: dict[str, Any]) -> BadRequestError:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        tag = str(context.get("discriminator", "")).strip("'")
        return MissingParameterError(f"{path}.{tag}" if tag else path)
    if kind == "extra_forbidden":
        return UnknownParameterError(clip(path))
    if kind in NUMBER_LIMITS:
        return _describe_number(path, error)
    if kind in LENGTH_LIMITS:
        return _describe_length(path, error)
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        return _describe_choice(path, error)
    if kind in ("value_error", "assertion_error"):
        return _invalid(path, f"Invalid '{path}': {context['error']}" if path else str(context["error"]))
    if kind == "string_unicode":
        return _invalid(path, f"Invalid '{path}': the string is not valid Unicode.")
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        message = f"Invalid '{path}': string does not match pattern. Expected a string that matches '{pattern}'."
        return _invalid(path, message)
    return _invalid(path, f"Invalid '{path}': {error['msg']}, but got {echo(value)} instead.")


def _invalid(path: str, message: str, code: str = "invalid_value") -> InvalidValueError:
    return InvalidValueError(message, param=path or None, code=code)


def _describe_number(path: str, error: dict[str, Any]) -> BadRequestError:
    is_upper, sign, key = NUMBER_LIMITS[error["type"]]
    limit, value = error["ctx"][key], error["input"]
    noun = "integer" if isinstance(value, int | str) and isinstance(limit, int) else "decimal"  # a query has strings
    limit = int(limit) if float(limit).is_integer() else limit
    message = (
        f"Invalid '{path}': {noun} {'above maximum' if is_upper else 'below minimum'} value. "
        f"Expected a value {sign} {limit}, but got {echo(value)} instead."
    )
    return _invalid(path, message, f"{noun}_{'above_max' if is_upper else 'below_min'}_value")


def _describe_length(path: str, error: dict[str, Any]) -> BadRequestError:
    noun, is_upper = LENGTH_LIMITS[error["type"]]
    context = error["ctx"]
    bound, limit = ("maximum", context.get("max_length")) if is_upper else ("minimum", context.get("min_length"))
    length = len(error["input"])
    expected = f"Expected {'an' if noun == 'array' else 'a'} {noun} with {bound} length {limit}"
    if length == 0:
        message = f"Invalid '{path}': empty {noun}. {expected}, but got an empty {noun} instead."
        return _invalid(path, message, f"empty_{noun}")
    got = f"{'an' if noun == 'array' else 'a'} {noun} with length {length}"
    message = f"Invalid '{path}': {noun} too {'long' if is_upper else 'short'}. {expected}, but got {got} instead."
    return _invalid(path, message, f"{noun}_{'above_max' if is_upper else 'below_min'}_length")


def _describe_choice(path: str, error: dict[str, Any]) -> BadRequestError:
    context, value = error["ctx"], error["input"]
    if error["type"] == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        path, value, supported = f"{path}.{tag}", context["tag"], context["expected_tags"]
    else:
        supported = context["expected"]
    if not isinstance(value, str):
        return InvalidTypeError(path, f"one of {supported}", json_type(value))
    return _invalid(path, f"Invalid value: {echo(value)}. Supported values are: {supported}.")
