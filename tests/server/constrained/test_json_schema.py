"""Schemas that are rewritten for llguidance allow the same answers as before."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.support.clients import CHAT
from tests.support.grammars import grammar_of, json_schema, matches
from tests.support.serving import RunningServer

NAMES = {"enum": ["a", "b"]}
REWRITTEN: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "object", "propertyNames": {"type": "string"}}, ['{"x":1}'], []),
    ({"type": "object", "propertyNames": NAMES}, ["{}", '{"b":[1]}', '{"a":1,"b":2}'], ['{"c":1}']),
    (
        {"type": "object", "propertyNames": NAMES | {"type": "string"}, "additionalProperties": {"type": "integer"}},
        ['{"a":1}'],
        ['{"a":"1"}', '{"c":1}'],
    ),
    (
        {"type": "object", "propertyNames": {"pattern": "^x+$"}, "additionalProperties": {"type": "integer"}},
        ['{"xx":1}'],
        ['{"y":1}', '{"x":""}'],
    ),
    (
        {"type": "object", "propertyNames": NAMES, "required": ["b"], "additionalProperties": {"type": "integer"}},
        ['{"b":1}'],
        ["{}", '{"a":1}', '{"b":""}'],
    ),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, ["[1,1]"], ['["1"]']),
    (
        {"type": "object", "properties": {"propertyNames": {"type": "string"}}, "required": ["propertyNames"]},
        ['{"propertyNames":""}'],
        ["{}", '{"propertyNames":1}'],
    ),
    (
        {"anyOf": [{"$ref": "#/$defs/m"}], "$defs": {"m": {"type": "object", "propertyNames": NAMES}}},
        ['{"a":1}'],
        ['{"c":1}'],
    ),
    ({"enum": [{"uniqueItems": False}]}, ['{"uniqueItems":false}'], ["{}"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), REWRITTEN)
def test_rewritten_keywords(
    shared_server: RunningServer, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    validator = Draft202012Validator(schema)
    for text in good + bad:
        assert validator.is_valid(json.loads(text)) == (text in good)
    grammar = grammar_of(shared_server, CHAT, response_format=json_schema(schema))
    assert [text for text in good if not matches(shared_server, grammar, text)] == []
    assert [text for text in bad if matches(shared_server, grammar, text)] == []


def test_names_within_names(shared_server: RunningServer) -> None:
    """Each level repeats the schema of its values once, however many names it allows."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(25):
        schema = {"type": "object", "propertyNames": NAMES, "additionalProperties": schema}
    grammar = grammar_of(shared_server, CHAT, response_format=json_schema(schema))
    assert len(grammar or "") < 5_000
    assert matches(shared_server, grammar, '{"a":' * 25 + "7" + "}" * 25)
