"""Types of values are those that a validator of JSON schemas accepts."""

import json
from typing import Any

import jsonschema
import pytest

from server.text.parsers.argument_values import JSON_TYPES, MAX_STEPS, ArgumentSchema, to_json
from tests.support.growth import num_calls

EXAMPLES: dict[str, list[Any]] = {
    **{"null": [None], "boolean": [True], "integer": [0, 1, 7], "number": [0.5]},
    **{"string": ["", "a", "b"], "array": [[], [1]], "object": [{}, {"a": 1}]},
}
ROOT: dict[str, Any] = {
    "$defs": {"name": {"type": "string"}, "a/b": {"$ref": "#/$defs/name"}, "loop": {"$ref": "#/$defs/loop"}}
}


SCHEMAS = [
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
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_types_of_values(schema: Any) -> None:
    validator = jsonschema.Draft202012Validator(ROOT | schema if isinstance(schema, dict) else schema)
    valid = {kind for kind, values in EXAMPLES.items() if any(map(validator.is_valid, values))}
    types = ArgumentSchema(ROOT).types(schema)
    assert valid <= types | ({"integer"} if "number" in types else set())
    assert types <= valid | {"integer", "number"}


def test_references_without_end_allow_everything() -> None:
    schema = ArgumentSchema(ROOT)
    assert schema.resolve({"$ref": "#/$defs/loop"}) == {}
    assert schema.resolve({"$ref": "#/nowhere"}) == schema.resolve(True) == {}


def test_types_of_parameters() -> None:
    choices = [{"properties": {"b": {"type": kind}}} for kind in ("null", "boolean")]
    schema = {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}, "anyOf": choices}
    for name, types in (("a", {"string"}), ("b", {"null", "boolean"}), ("c", {"integer"})):
        assert ArgumentSchema(schema).parameter_types(name) == types
    assert ArgumentSchema({}).parameter_types("a") == JSON_TYPES
    itself = {"anyOf": [{"$ref": "#"}, {"properties": {"a": {"type": "string"}}}]}
    assert ArgumentSchema(itself).parameter_types("a") == {"string"}
    assert ArgumentSchema(TREE).parameter_types("children") == {"array"}


TREE: dict[str, Any] = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}


BIG = dict.fromkeys(map(str, range(1000)))


def alternatives(number: int) -> dict[str, Any]:
    """Return definitions each of which refers to all of them, in alternatives and in what they combine."""
    references = [{"$ref": f"#/$defs/{index}", "title": ""} for index in range(number)]
    definitions = {str(index): {"anyOf": references, "allOf": references} for index in range(number)}
    return {"$defs": definitions, "properties": {"a": references[0]}, **definitions["0"]}


@pytest.mark.checklist("C21")
@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        {"anyOf": [{"$ref": "#"}] * 17},
        alternatives(3),
        alternatives(40),
        {"properties": {"a": {"enum": list(range(100_000))}}, "anyOf": [{}] * 100_000},
        {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/big", "title": ""}] * 1000}}, "$defs": {"big": BIG}},
    ],
    ids=["tree", "itself", "few", "many", "long", "copies"],
)
def test_each_part_of_a_schema_is_looked_at_once(schema: dict[str, Any]) -> None:
    """References that lead to one another multiply no work; what is not looked at may be anything."""
    find_types = ArgumentSchema(schema).parameter_types
    assert num_calls(lambda: (find_types("children"), find_types("a"))) < 40 * MAX_STEPS


def test_what_many_refer_to_counts_once() -> None:
    many = {"anyOf": [{"$ref": "#/$defs/a"} for _ in range(50)]}
    schema = {"properties": {"a": many}, "$defs": {"a": {"type": ["string"] * 100}}}
    assert ArgumentSchema(schema, max_steps=400).parameter_types("a") == {"string"}
    assert ArgumentSchema(schema, max_steps=100).parameter_types("a") == JSON_TYPES


def test_long_references_are_not_followed() -> None:
    for length, types in ((900, {"string"}), (1100, JSON_TYPES)):
        name = "a" * length
        schema = {"properties": {"a": {"$ref": f"#/$defs/{name}"}}, "$defs": {name: {"type": "string"}}}
        assert ArgumentSchema(schema).parameter_types("a") == types


@pytest.mark.parametrize("odd", [{"type": [{}]}, {"anyOf": 5}, {"allOf": "a"}, {"enum": {}}, {"$ref": 1}, [], 5, None])
def test_what_is_no_schema_allows_everything(odd: Any) -> None:
    for schema in ({"properties": {"a": odd}}, {"properties": odd}, {"additionalProperties": odd}, odd):
        assert ArgumentSchema(schema).parameter_types("a") >= {"string"} or odd == {"type": [{}]}


def test_what_is_converted_is_json() -> None:
    for text in ("", "x", '"', "1", "01", "1e999", "{", "[1,", "nan", "\ud7ff", "[" * 5000):
        for types in (JSON_TYPES, frozenset(("integer",)), frozenset(("string", "null"))):
            json.loads(to_json(text, types))
