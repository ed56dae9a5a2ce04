"""Rewrites JSON schemas and patterns in the forms that llguidance follows: patterns are those of Rust's crate regex."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher

from server.constrained.closed_objects import (
    ANNOTATIONS,
    SCHEMA_KEYS,
    SCHEMA_LIST_KEYS,
    SCHEMA_MAP_KEYS,
    Narrowing,
    find_narrowing,
)
from server.text.parsers.markers import escape_regex

ANY_NAME: tuple[Any, ...] = (True, {}, {"type": "string"})  # values of propertyNames that allow all names

# Rust's classes cover all of Unicode. Those of JSON Schema's dialect, ECMAScript's, are ASCII. A class in brackets may
# stand within brackets too, so that these need not be told apart.
_ASCII_CLASSES = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[\x09-\x0D\x20]"}
_CLASSES = _ASCII_CLASSES | {name.upper(): f"[^{text[1:]}" for name, text in _ASCII_CLASSES.items()}


def normalize_schema(schema: Mapping[str, Any], *, allow_additional_properties: bool = False) -> dict[str, Any]:
    """Return the schema for llguidance. Recurses, so the caller bounds the depth of `schema`.

    Args:
        allow_additional_properties: whether objects whose schema names properties and has no `additionalProperties`
            may have others. Otherwise they are closed (see `server.constrained.closed_objects`).
    """
    narrowing = find_narrowing(schema)
    return _normalize(schema, Narrowing(tags=narrowing.tags) if allow_additional_properties else narrowing)


def _normalize(schema: Mapping[str, Any], narrowing: Narrowing) -> dict[str, Any]:
    result = {key: _normalize_value(key, value, narrowing) for key, value in schema.items()}
    if id(schema) in narrowing.closed:
        result["additionalProperties"] = False
    if tags := narrowing.tags.get(id(schema)):
        result["required"] = [*result.get("required", ()), *sorted(tags)]
    if isinstance(pattern := result.get("pattern"), str):
        result["pattern"] = ascii_classes(pattern)
    if isinstance(result.get("uniqueItems"), bool):  # not enforced: see `unenforced_keywords`
        del result["uniqueItems"]
    names = result.pop("propertyNames", None)
    if names is not None and names not in ANY_NAME:
        result |= _replace_property_names(names, result)
    return result


def _normalize_value(key: str, value: Any, narrowing: Narrowing) -> Any:
    if key in SCHEMA_KEYS and isinstance(value, Mapping):
        return _normalize(value, narrowing)
    if key in SCHEMA_LIST_KEYS and isinstance(value, list):
        return [_normalize(item, narrowing) if isinstance(item, Mapping) else item for item in value]
    if key in SCHEMA_MAP_KEYS and isinstance(value, Mapping):
        result = {
            name: _normalize(item, narrowing) if isinstance(item, Mapping) else item for name, item in value.items()
        }
        return _with_ascii_names(result) if key == "patternProperties" else result
    return value


def _with_ascii_names(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of `patternProperties` with patterns for llguidance, which refuses two that are the same."""
    result: dict[str, Any] = {}
    for pattern, schema in schemas.items():
        name = ascii_classes(pattern)
        while name in result:
            name = f"(?:{name})"
        result[name] = schema
    return result


def _replace_property_names(names: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys that restrict property names as `propertyNames` does, or that key itself if none can."""
    if {"properties", "patternProperties"} & schema.keys() or not isinstance(names, Mapping):
        return {"propertyNames": names}
    value = schema.get("additionalProperties", True)
    match {key: value for key, value in names.items() if (key, value) != ("type", "string") and key not in ANNOTATIONS}:
        case {"enum": [*allowed], **others} if not others and all(isinstance(name, str) for name in allowed):
            pattern = "|".join(map(escape_regex, allowed))  # one pattern, so that the value's schema is compiled once
            return {"patternProperties": {f"^({pattern})$": value}, "additionalProperties": False}
        case {"pattern": str(pattern), **others} if not others:
            return {"patternProperties": {pattern: value}, "additionalProperties": False}
    return {"propertyNames": names}


def ascii_classes(pattern: str) -> str:
    r"""Return the pattern with `\d`, `\w`, `\s` and their complements in ASCII, as in Python with `re.ASCII`."""
    # A hyphen before a class within brackets is a literal, not a range that ends with a bracket.
    return re.sub(
        r"\\(.)|-(?=\\[dwsDWS])", lambda found: _CLASSES.get(found[1], _escaped(found[0])), pattern, flags=re.S
    )


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that match a pattern as a whole."""
    return LLMatcher.grammar_from_regex(ascii_classes(pattern))


def lark_regex(pattern: str) -> str:
    """Return a regular expression in Lark's notation."""
    grammar = msgspec.json.decode(regex_grammar(pattern))
    lark: str = grammar["grammars"][0]["lark_grammar"]
    return lark.removeprefix("start: ")


def _escaped(text: str) -> str:
    return r"\-" if text == "-" else text
