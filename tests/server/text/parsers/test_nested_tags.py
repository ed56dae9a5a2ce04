"""Values whose members and items are tags."""

import json
from typing import Any

import pytest

from server.text.parsers.argument_values import ArgumentSchema
from server.text.parsers.nested_tags import nested_to_json
from server.text.parsers.tool_formats import KEY, TaggedArguments

SYNTAX = TaggedArguments("<", ">", f"NS</{KEY}>", is_nested=True)
SCHEMA: dict[str, Any] = {
    "properties": {
        "list": {"type": "array", "items": {"type": "integer"}},
        "lists": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
        "object": {
            "type": "object",
            "properties": {"a": {"type": "string"}, "item": {"type": "boolean"}, "list": {"$ref": "#/properties/list"}},
        },
        "number": {"type": "number"},
        "any": {},
    }
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("list", "NS<item>1NS</item>NS<item>2NS</item>", [1, 2]),
        ("list", " \n", []),
        ("list", "[1, 2]", [1, 2]),
        ("lists", "NS<item>NS<item>1NS</item>NS</item>NS<item>NS</item>", [["1"], []]),
        ("object", "NS<a>1NS</a>NS<list>NS<item>3NS</item>NS</list>", {"a": "1", "list": [3]}),
        ("object", "NS<item>trueNS</item>", {"item": True}),
        ("object", "", {}),
        ("number", "0.5", 0.5),
        ("any", "NS<item>1NS</item>", [1]),
        ("any", "NS<a>xNS</a>", {"a": "x"}),
        ("list", "NS<item>1NS</x>", "NS<item>1NS</x>"),
        ("list", "xNS<item>1NS</item>", "xNS<item>1NS</item>"),
        ("list", "NS<item>1", "NS<item>1"),
        ("list", "NS<item>1NS</item>x", "NS<item>1NS</item>x"),
        ("list", "NS</item>", "NS</item>"),
    ],
)
def test_nested_values(key: str, text: str, value: Any) -> None:
    assert json.loads(nested_to_json(text, ArgumentSchema(SCHEMA), key, SYNTAX)) == value


@pytest.mark.checklist("C24")
def test_depth_is_bounded() -> None:
    text = "NS<item>" * 500 + "NS</item>" * 500
    assert json.loads(nested_to_json(text, ArgumentSchema(SCHEMA), "any", SYNTAX))
