"""Arguments between tags are converted to JSON by the types of the tool's schema."""

import json
from typing import Any

import pytest

from server.text.parsers.argument_values import ArgumentSchema
from server.text.parsers.tagged_arguments import TaggedArgumentsReader
from server.text.parsers.tool_formats import KEY, TaggedArguments
from tests.server.text.parsers.test_tool_parser import push_all

PADDED = TaggedArguments("<parameter=", ">\n", "\n</parameter>\n", is_padded=True)
GLM = TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
SCHEMA: dict[str, Any] = {
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "maybe": {"type": ["number", "null"]},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "object": {"type": "object"},
    }
}


def convert(syntax: TaggedArguments, pieces: list[str], schema: dict[str, Any] = SCHEMA) -> tuple[str, str, bool]:
    """Return the JSON, the text after the arguments, and whether they are complete."""
    return push_all(TaggedArgumentsReader(syntax, ArgumentSchema(schema)), pieces)


NESTED = TaggedArguments("NS<", ">", f"NS</{KEY}>", is_nested=True)


def test_members_may_have_the_name_of_the_argument() -> None:
    """As in a tree."""
    tree = {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}]}
    text, value = "NS<a>1NS</a>", {"a": 1}
    for _ in range(4):
        for pieces in ([text + "end"], list(text + "end")):
            found, rest, is_complete = convert(NESTED, pieces, {"properties": {"a": tree}})
            assert (json.loads(found), rest, is_complete) == (value, "end", True)
        text, value = f"NS<a>{text}NS</a>", {"a": value}  # type: ignore[dict-item]


def test_tags_in_a_string_do_not_count() -> None:
    found, rest, _ = convert(NESTED, ["NS<a>NS<a>NS</a>end"], {"properties": {"a": {"type": "string"}}})
    assert (json.loads(found), rest) == ({"a": "NS<a>"}, "end")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("integer", " 3 ", 3),
        ("integer", "3.0", 3),
        ("integer", "three", "three"),
        ("number", "1e400", float("inf")),
        ("boolean", "True", True),
        ("boolean", "yes", "yes"),
        ("string", "3", "3"),
        ("string", "null", "null"),
        ("string", "", ""),
        (["string", "null"], "null", None),
        (["string", "integer"], "3", 3),
        (["string", "integer"], "three", "three"),
        ("null", "None", None),
        ("object", "{", "{"),
        ("array", "[1, {}]", [1, {}]),
    ],
)
def test_values_have_the_types_of_the_schema(kind: Any, text: str, value: Any) -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": kind}}}
    found, _, _ = convert(PADDED, [f"<parameter=x>\n{text}\n</parameter>\n</function>"], schema)
    assert json.loads(found) == {"x": value}


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("[1]", [1]), ("true", True), ("x", "x"), ('"x"', '"x"'), ("", ""), ("nul", "nul")]
)
def test_values_that_the_schema_does_not_name(text: str, value: Any) -> None:
    found, _, _ = convert(GLM, [f"<arg_key>other</arg_key><arg_value>{text}</arg_value></tool_call>"])
    assert json.loads(found) == {"other": value}


def test_layout_between_tags_is_free() -> None:
    for text in ("<parameter=text>a</parameter></function>", " <parameter=text>\na</parameter>\n\n</function>"):
        assert convert(PADDED, list(text))[0] == '{"text": "a"}'
    assert convert(PADDED, ["<parameter=text>\n\na\n\n</parameter>x"])[0] == '{"text": "\\na\\n"}'


def test_the_text_after_a_key_may_depend_on_the_type() -> None:
    after_keys = {kind: f'" string="{str(kind == "string").lower()}">' for kind in ("string", "number", "object")}
    syntax = TaggedArguments('<p name="', '" string="true">', "</p>", after_keys=after_keys)
    text = '<p name="text" string="true">3</p><p name="count" string="false">3</p>x'
    assert convert(syntax, list(text)) == convert(syntax, [text]) == ('{"text": "3", "count": 3}', "x", True)


def test_text_that_is_no_argument_ends_the_arguments() -> None:
    assert convert(PADDED, list("<parameter=text>\na\n</parameter>\nWell")) == ('{"text": "a"}', "\nWell", True)
    assert convert(PADDED, ["</function>"]) == ("{}", "</function>", True)


def test_strings_are_streamed_and_others_are_not() -> None:
    reader = TaggedArgumentsReader(PADDED, ArgumentSchema(SCHEMA))
    pieces = ["<parameter=text>", "\n", "ab", "\n", "</par", "ty", "\n</parameter>\n<parameter=count>\n", "1"]
    streamed = [reader.push(piece)[0] for piece in [*pieces, "2\n</parameter>"]]
    assert streamed == ['{"text": "', "", "ab", "", "", "\\n</party", '", "count": ', "", "12"]
