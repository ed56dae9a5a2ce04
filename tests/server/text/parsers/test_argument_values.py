"""Types of values are those that a validator of JSON schemas accepts."""

import json
from typing import Any

import jsonschema
import pytest

from server.text.parsers.argument_values import JSON_TYPES, parameter_types, resolve, to_json, value_types

EXAMPLES: dict[str, list[Any]] = {
    "null": [None],
    "boolean": [True],
    "integer": [0, 1, 7],
    "number": [0.5],
    "string": ["", "a", "b"],
    "array": [[], [1]],
    "object": [{}, {"a": 1}],
}
ROOT: dict[str, Any] = {
    "$defs": {"name": {"type": "string"}, "a/b": {"$ref": "#/$defs/name"}, "loop": {"$ref": "#/$defs/loop"}}
}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": "integer"},
        {"type": "number"},
        {"type": ["string", "null"]},
        {"enum": [1, "a", None]},
        {"const": {"a": 1}},
        {"anyOf": [{"type": "integer"}, {"type": "array"}]},
        {"oneOf": [{"type": "boolean"}, {"enum": ["a"]}]},
        {"allOf": [{"type": ["string", "integer"]}, {"type": ["string", "null"]}]},
        {"$ref": "#/$defs/name"},
        {"$ref": "#/$defs/a~1b"},
        {"type": "string", "enum": ["a", 1]},
    ],
)
def test_types_of_values(schema: Any) -> None:
    whole = ROOT | schema if isinstance(schema, dict) else schema
    valid = {
        kind
        for kind, values in EXAMPLES.items()
        if any(jsonschema.Draft202012Validator(whole).is_valid(v) for v in values)
    }
    types = value_types(schema, ROOT)
    assert valid <= types | ({"integer"} if "number" in types else set())
    assert types <= valid | {"integer", "number"}


def test_references_without_end_allow_everything() -> None:
    assert resolve({"$ref": "#/$defs/loop"}, ROOT) == {}
    assert resolve({"$ref": "#/nowhere"}, ROOT) == resolve(True, ROOT) == {}


def test_types_of_parameters() -> None:
    schema = {
        "properties": {"a": {"type": "string"}},
        "additionalProperties": {"type": "integer"},
        "anyOf": [{"properties": {"b": {"type": "null"}}}, {"properties": {"b": {"type": "boolean"}}}],
    }
    assert parameter_types(schema, "a") == {"string"}
    assert parameter_types(schema, "b") == {"null", "boolean"}
    assert parameter_types(schema, "c") == {"integer"}
    assert parameter_types({}, "a") == JSON_TYPES


def test_what_is_converted_is_json() -> None:
    for text in ("", "x", '"', "1", "01", "1e999", "{", "[1,", "nan", "\ud7ff", "[" * 5000):
        for types in (JSON_TYPES, frozenset(("integer",)), frozenset(("string", "null"))):
            json.loads(to_json(text, types))
