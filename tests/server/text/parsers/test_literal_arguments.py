"""Arguments as literals are converted to JSON, against Python's own parser."""

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.argument_values import ArgumentSchema
from server.text.parsers.literal_arguments import LiteralArgumentsReader
from server.text.parsers.tool_formats import GEMMA, PYTHON, LiteralArguments
from tests.server.text.parsers.test_tool_parser import cut, push_all


def convert(syntax: LiteralArguments, pieces: list[str], schema: dict[str, Any] | None = None) -> tuple[str, str, bool]:
    """Return the JSON, the text after the arguments, and whether they are complete."""
    reader = LiteralArgumentsReader(syntax, ArgumentSchema(schema or {}))
    assert reader.begins_with("")
    return push_all(reader, pieces)


SCALARS = (
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-9, 9) | st.text("aé'\"\\\n\t{}[](),:=", max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab '\"", max_size=3), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b_2", "C"]), VALUES, max_size=3)
CUTS = st.lists(st.integers(0, 200), max_size=12)


@given(ARGUMENTS, CUTS, st.booleans())
def test_python_literals(arguments: dict[str, Any], cuts: list[int], with_json: bool) -> None:
    def write(value: Any) -> str:
        return json.dumps(value) if with_json and not isinstance(value, bool | None) else repr(value)

    text = ", ".join(f"{name}={write(value)}" for name, value in arguments.items()) + ")]"
    found, rest, is_complete = convert(PYTHON, cut(text, cuts))
    assert json.loads(found) == arguments
    assert (rest, is_complete) == ("]", True)
    assert convert(PYTHON, list(text)) == (found, rest, is_complete)


@pytest.mark.parametrize("text", [r"'\x41\u00e9\'\"\\\n\t'", '"a\\\nb"', "(1, 2,)", "[1,]", "{'a': (), }", "-1.5e3"])
def test_spellings_of_python(text: str) -> None:
    value = ast.literal_eval(text)
    expected = list(value) if isinstance(value, tuple) else {"a": []} if value == {"a": ()} else value
    found, _, is_complete = convert(PYTHON, list(f"x={text})"))
    assert json.loads(found) == {"x": expected}
    assert is_complete


def gemma(value: Any) -> str:
    """Write a value as Gemma's chat template does."""
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{gemma(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(map(gemma, value)) + "]"
    return json.dumps(value)


ODD = ["a", "my city", "a:b", "x,y", "{", "=", '"q"', "it's", ' <|"|>', "城 "]
ODD_SCHEMA: dict[str, Any] = {"properties": {name: {"$ref": "#"} for name in ODD}, "items": {"$ref": "#"}}
ODD_VALUES = st.recursive(
    st.booleans() | st.integers(-99, 99) | st.text('a:"', max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(ODD), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(ODD), ODD_VALUES, max_size=4), CUTS)
def test_names_of_the_schema_may_have_any_characters(arguments: dict[str, Any], cuts: list[int]) -> None:
    """In objects inside others, too."""
    found, rest, is_complete = convert(GEMMA, cut(gemma(arguments)[1:] + "<tool_call|>", cuts), ODD_SCHEMA)
    assert json.loads(found) == arguments
    assert (rest, is_complete) == ("<tool_call|>", True)


def test_other_names_may_have_spaces() -> None:
    assert convert(PYTHON, list("my city ='Rome', b={my key: 1})"))[0] == '{"my city": "Rome", "b": {"my key": 1}}'
    assert convert(GEMMA, ["my city:3}"]) == ('{"my city": 3}', "", True)


SOUP = st.lists(
    st.sampled_from(["a", "=", "'", '"', "(", ")", "[", "]", "{", "}", ",", ":", " ", "1", "True", "\\", "<"]),
    max_size=12,
)


@given(SOUP.map("".join), CUTS)
def test_arguments_that_end_are_json_in_any_pieces(text: str, cuts: list[int]) -> None:
    """Text that is no literal ends the arguments and is left unread."""
    found, rest, is_complete = convert(PYTHON, [text])
    assert convert(PYTHON, cut(text, cuts))[::2] == convert(PYTHON, list(text) or [""])[::2] == (found, is_complete)
    if is_complete:
        assert isinstance(json.loads(found), dict)
        assert text.endswith(rest)


def test_strings_are_streamed() -> None:
    reader = LiteralArgumentsReader(PYTHON)
    streamed = [reader.push(piece)[0] for piece in ("a", "='x", "y", "\\", "n", "'", ")")]
    assert streamed == ["{", '"a": "x', "y", "", "\\n", '"', "}"]
