"""JSON schemas in words that llguidance knows: what says nothing left out, what it does not know said otherwise."""

import re
from collections.abc import Mapping
from typing import Any

# Where a schema has others: one, a list of them, or several by name.
ONE = ("items", "additionalProperties", "additionalItems", "propertyNames", "not", "if", "then", "else", "contains")
LISTS = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

NOTES = ("title", "description")
ANY_NAME: tuple[Any, ...] = (True, {}, {"type": "string"})


def followable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same answers are valid under it. Not nested deeper than Python can follow."""
    result = {key: _within(key, value) for key, value in schema.items()}
    if result.get("uniqueItems") is False:
        del result["uniqueItems"]
    names = result.pop("propertyNames", None)
    if names is not None and names not in ANY_NAME:
        result |= _of_names(names, result)
    return result


def escaped(text: str) -> str:
    """A regular expression of the text alone, also between slashes."""
    return re.sub(r"\W", lambda found: f"\\x{{{ord(found[0]):x}}}", text)


def _within(key: str, value: Any) -> Any:
    if key in ONE and isinstance(value, Mapping):
        return followable(value)
    if key in LISTS and isinstance(value, list):
        return [followable(item) if isinstance(item, Mapping) else item for item in value]
    if key in NAMED and isinstance(value, Mapping):
        return {name: followable(item) if isinstance(item, Mapping) else item for name, item in value.items()}
    return value


def _of_names(names: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """What says of the properties' names the same as `propertyNames` does, or that itself where nothing does."""
    if {"properties", "patternProperties"} & schema.keys() or not isinstance(names, Mapping):
        return {"propertyNames": names}
    value = schema.get("additionalProperties", True)
    match {key: value for key, value in names.items() if (key, value) != ("type", "string") and key not in NOTES}:
        case {"enum": [*allowed], **others} if not others and all(isinstance(name, str) for name in allowed):
            pattern = "|".join(map(escaped, allowed))  # which has the schema of their values once
            return {"patternProperties": {f"^({pattern})$": value}, "additionalProperties": False}
        case {"pattern": str(pattern), **others} if not others:
            return {"patternProperties": {pattern: value}, "additionalProperties": False}
    return {"propertyNames": names}
