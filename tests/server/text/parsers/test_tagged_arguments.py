"""Arguments between tags are converted to JSON by the types of the tool's schema."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.argument_values import ArgumentSchema
from server.text.parsers.tagged_arguments import TaggedArgumentsReader
from server.text.parsers.tool_formats import KEY, TaggedArguments
from tests.server.text.parsers.test_tool_parser import cut, push_all

PADDED = TaggedArguments("<parameter=", ">\n", "\n</parameter>\n", is_padded=True)
GLM = TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
TYPED = TaggedArguments(
    '<p name="',
    '" string="true">',
    "</p>",
    after_keys={kind: f'" string="{str(kind == "string").lower()}">' for kind in ("string", "number", "object")},
)
SYNTAXES = pytest.mark.parametrize("syntax", [PADDED, GLM, TYPED], ids=["padded", "glm", "typed"])
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
VALUES = {
    "text": st.text('a<>/é\n" \\{}', max_size=8),
    "count": st.integers(),
    "maybe": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "items": st.lists(st.integers() | st.text(max_size=3), max_size=3),
    "object": st.dictionaries(st.text(max_size=3), st.booleans() | st.none(), max_size=3),
}


def write(syntax: TaggedArguments, arguments: dict[str, Any]) -> str:
    text = ""
    for key, value in arguments.items():
        kind = "string" if isinstance(value, str) else "number"
        after_key = syntax.after_keys.get(kind, syntax.after_key)
        shown = value if isinstance(value, str) else json.dumps(value)
        text += f"{syntax.before_key}{key}{after_key}{shown}{syntax.after_value}"
    return text


def convert(syntax: TaggedArguments, pieces: list[str], schema: dict[str, Any] = SCHEMA) -> tuple[str, str, bool]:
    """Return the JSON, the text after the arguments, and whether they are complete."""
    return push_all(TaggedArgumentsReader(syntax, ArgumentSchema(schema)), pieces)


@SYNTAXES
@given(st.data(), st.lists(st.integers(0, 300), max_size=12))
def test_arguments(syntax: TaggedArguments, data: st.DataObject, cuts: list[int]) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True))
    arguments = {name: data.draw(VALUES[name]) for name in names}
    text = write(syntax, arguments) + "</function>"
    found, rest, is_complete = convert(syntax, cut(text, cuts))
    assert json.loads(found) == arguments
    assert (rest.lstrip(), is_complete) == ("</function>", True)
    assert convert(syntax, list(text))[0] == found


NESTED = TaggedArguments("NS<", ">", f"NS</{KEY}>", is_nested=True)


@pytest.mark.parametrize("depth", range(4))
def test_members_may_have_the_name_of_the_argument(depth: int) -> None:
    """As in a tree."""
    tree = {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}]}
    text, value = "NS<a>1NS</a>", {"a": 1}
    for _ in range(depth):
        text, value = f"NS<a>{text}NS</a>", {"a": value}  # type: ignore[dict-item]
    for pieces in ([text + "end"], list(text + "end")):
        found, rest, is_complete = convert(NESTED, pieces, {"properties": {"a": tree}})
        assert json.loads(found) == value
        assert (rest, is_complete) == ("end", True)


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


def test_text_that_is_no_argument_ends_the_arguments() -> None:
    assert convert(PADDED, list("<parameter=text>\na\n</parameter>\nWell")) == ('{"text": "a"}', "\nWell", True)
    assert convert(PADDED, ["</function>"]) == ("{}", "</function>", True)


def test_strings_are_streamed_and_others_are_not() -> None:
    reader = TaggedArgumentsReader(PADDED, ArgumentSchema(SCHEMA))
    pieces = [
        "<parameter=text>",
        "\n",
        "ab",
        "\n",
        "</par",
        "ty",
        "\n</parameter>\n<parameter=count>\n",
        "1",
        "2\n</parameter>",
    ]
    assert [reader.push(piece)[0] for piece in pieces] == [
        '{"text": "',
        "",
        "ab",
        "",
        "",
        "\\n</party",
        '", "count": ',
        "",
        "12",
    ]
