"""Rewrites JSON schemas so that llguidance can follow them: drops keys without effect, replaces unsupported ones."""

import re
from collections.abc import Mapping
from typing import Any

# Keys whose value is a schema, a list of schemas, or an object of schemas by name.
SCHEMA_KEYS = frozenset(
    ("items", "additionalProperties", "additionalItems", "propertyNames", "not", "if", "then", "else", "contains")
)
SCHEMA_LIST_KEYS = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
SCHEMA_MAP_KEYS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

ANNOTATIONS = ("title", "description")
ANY_NAME: tuple[Any, ...] = (True, {}, {"type": "string"})  # values of propertyNames that allow all names


def normalize_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an equivalent schema for llguidance. Recurses, so the caller bounds the depth of `schema`."""
    result = {key: _normalize_value(key, value) for key, value in schema.items()}
    if result.get("uniqueItems") is False:
        del result["uniqueItems"]
    names = result.pop("propertyNames", None)
    if names is not None and names not in ANY_NAME:
        result |= _replace_property_names(names, result)
    return result


def escape_regex(text: str) -> str:
    """Return a regular expression that matches the text alone, also between slashes."""
    return re.sub(r"\W", lambda found: f"\\x{{{ord(found[0]):x}}}", text)


def _normalize_value(key: str, value: Any) -> Any:
    if key in SCHEMA_KEYS and isinstance(value, Mapping):
        return normalize_schema(value)
    if key in SCHEMA_LIST_KEYS and isinstance(value, list):
        return [normalize_schema(item) if isinstance(item, Mapping) else item for item in value]
    if key in SCHEMA_MAP_KEYS and isinstance(value, Mapping):
        return {name: normalize_schema(item) if isinstance(item, Mapping) else item for name, item in value.items()}
    return value


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
