"""Convert the arguments of formats that write values as plain text, by the types that the tool's schema allows."""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

Schema = Mapping[str, Any]
JSON_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
STRING = frozenset(("string",))
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
MAX_REFERENCES = 16  # `$ref` that refer to one another


def resolve(schema: Any, root: Schema) -> Schema:
    """Return a schema with its `$ref` replaced by the part of `root` that it refers to, or {} if there is none."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = _follow(reference, root) | {name: value for name, value in schema.items() if name != "$ref"}
    return {}


def _follow(reference: str, root: Schema) -> dict[str, Any]:
    value: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def value_types(schema: Any, root: Schema, depth: int = 0) -> frozenset[str]:
    """Return the JSON types of the values that a schema allows; all of them if it does not say."""
    schema = resolve(schema, root)
    if depth > MAX_REFERENCES:
        return JSON_TYPES
    types = JSON_TYPES
    if isinstance(kind := schema.get("type"), str | list):
        types &= frozenset((kind,) if isinstance(kind, str) else kind)
    if isinstance(values := schema.get("enum"), list):
        types &= frozenset().union(*map(_types_of, values))
    if "const" in schema:
        types &= _types_of(schema["const"])
    for name in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(name), list):
            types &= frozenset().union(*(value_types(choice, root, depth + 1) for choice in choices))
    for part in schema.get("allOf") or ():
        types &= value_types(part, root, depth + 1)
    return types


def parameter_types(schema: Schema, name: str) -> frozenset[str]:
    """Return the types of a parameter of a tool with this JSON schema."""
    root = schema
    schema = resolve(schema, root)
    parts = _parts(schema, root)
    schemas = [part["properties"][name] for part in parts if name in (part.get("properties") or {})]
    schemas = schemas or [part["additionalProperties"] for part in parts if "additionalProperties" in part]
    return frozenset().union(*(value_types(each, root) for each in schemas)) if schemas else JSON_TYPES


def _parts(schema: Schema, root: Schema, depth: int = 0) -> list[Schema]:
    """Return a schema and those that it combines."""
    parts = [schema]
    for name in ("anyOf", "oneOf", "allOf"):
        for part in (schema.get(name) or ()) if depth < MAX_REFERENCES else ():
            parts += _parts(resolve(part, root), root, depth + 1)
    return parts


def to_json(text: str, types: frozenset[str]) -> str:
    """Return a value as JSON. Text that is no value of one of the types is a string."""
    stripped = text.strip()
    if "number" in types and NUMBER.fullmatch(stripped):  # perhaps beyond the range of floats
        return stripped
    value = _decode(stripped)
    if value is not msgspec.UNSET and not isinstance(value, str) and _types_of(value) & types:
        is_whole = isinstance(value, float) and "number" not in types
        return str(int(value)) if is_whole else stripped
    if (word := stripped.lower()) in ("true", "false") and "boolean" in types and "string" not in types:
        return word
    if stripped in ("None", "NULL", "Null") and "null" in types and "string" not in types:
        return "null"
    return json.dumps(text, ensure_ascii=False)


def _decode(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):  # msgspec's errors and those about lone surrogates are ValueErrors
        return msgspec.UNSET


def _types_of(value: Any) -> frozenset[str]:
    """Return the JSON types of a value."""
    match value:
        case None:
            return frozenset(("null",))
        case bool():
            return frozenset(("boolean",))
        case int():
            return frozenset(("integer", "number"))
        case float():
            return frozenset(("integer", "number") if value.is_integer() else ("number",))
        case str():
            return STRING
        case list():
            return frozenset(("array",))
    return frozenset(("object",))
