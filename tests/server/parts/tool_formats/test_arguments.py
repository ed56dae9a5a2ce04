"""Arguments between tags, or as literals of a language, are converted to JSON by the types of the tool's schema."""

import ast
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parts.tool_formats.argument_schema import JSON_TYPES, MAX_STEPS, ArgumentSchema, to_json
from server.parts.tool_formats.literals import GEMMA, PYTHON, LiteralArguments
from server.parts.tool_formats.named import MAX_HEAD_CHARS, UNDECIDED, Head
from server.parts.tool_formats.tags import TaggedArguments
from server.text.parsers.tool_formats import INDEX, NAME, ToolFormat
from tests.server.text.parsers import test_tool_parser
from tests.support.growth import num_calls
from tests.support.parsing import cut
from tests.support.tool_templates import load_template

PADDED = TaggedArguments("<parameter=", ">\n", "\n</parameter>\n", is_padded=True)
GLM = TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
Syntax = TaggedArguments | LiteralArguments
SCHEMA: dict[str, Any] = {"properties": {"text": {"type": "string"}, "count": {"type": "integer"}}}


def convert(syntax: Syntax, pieces: list[str], schema: Any = None) -> tuple[str, str, bool]:
    """Return the JSON, the text after the arguments, and whether they are complete."""
    reader, found, is_complete = syntax.arguments_reader(syntax.prepare(schema or {})), "", False
    assert reader.begins_with("")
    for index, piece in enumerate(pieces):
        json_text, is_complete = reader.push(piece)
        found += json_text
        if is_complete:
            return found, reader.unread + "".join(pieces[index + 1 :]), True
    return found, reader.unread, is_complete


# Between tags.


TYPED = [
    ("integer", " 3 ", 3),
    ("integer", "3.0", 3),
    ("integer", "three", "three"),
    ("number", "1e400", float("inf")),
    ("boolean", "True", True),
    ("string", "null", "null"),
    (["string", "null"], "null", None),
    (["string", "integer"], "3", 3),
    (["string", "integer"], "three", "three"),
    ("null", "None", None),
    ("array", "[1, {}]", [1, {}]),
]


@pytest.mark.parametrize(("kind", "text", "value"), TYPED)
def test_values_have_the_types_of_the_schema(kind: Any, text: str, value: Any) -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": kind}}}
    found, _, _ = convert(PADDED, [f"<parameter=x>\n{text}\n</parameter>\n</function>"], schema)
    assert json.loads(found) == {"x": value}


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("[1]", [1]), ("true", True), ("x", "x"), ('"x"', '"x"'), ("", ""), ("nul", "nul")]
)
def test_values_that_the_schema_does_not_name(text: str, value: Any) -> None:
    found, _, _ = convert(GLM, [f"<arg_key>other</arg_key><arg_value>{text}</arg_value></tool_call>"], SCHEMA)
    assert json.loads(found) == {"other": value}


LAYOUTS = [
    ("<parameter=text>a</parameter></function>", ('{"text": "a"}', "</function>", True)),
    (" <parameter=text>\na</parameter>\n\n</function>", ('{"text": "a"}', "\n\n</function>", True)),
    ("<parameter=text>\n\na\n\n</parameter>x", ('{"text": "\\na\\n"}', "x", True)),
    ("<parameter=text>\na\n</parameter>\nWell", ('{"text": "a"}', "\nWell", True)),
    ("</function>", ("{}", "</function>", True)),
]


@pytest.mark.parametrize(("text", "expected"), LAYOUTS)
def test_layout_is_free_and_other_text_ends_the_arguments(text: str, expected: tuple[str, str, bool]) -> None:
    assert convert(PADDED, [text], SCHEMA) == convert(PADDED, list(text), SCHEMA) == expected


# Literals.

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
    assert (json.loads(found), rest, is_complete) == (arguments, "]", True)
    assert convert(PYTHON, list(text)) == (found, rest, is_complete)


@pytest.mark.parametrize("text", [r"'\x41\u00e9\'\"\\\n\t'", '"a\\\nb"', "(1, 2,)", "[1,]", "{'a': (), }", "-1.5e3"])
def test_spellings_of_python(text: str) -> None:
    found, _, is_complete = convert(PYTHON, list(f"x={text})"))
    assert json.loads(found) == {"x": json.loads(json.dumps(ast.literal_eval(text)))}
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


GEMMA_VALUES = st.recursive(
    st.booleans() | st.integers(-99, 99) | st.text('a:"', max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "my city", "城"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["a", "my city", "城"]), GEMMA_VALUES), CUTS)
def test_literals_of_gemma(arguments: dict[str, Any], cuts: list[int]) -> None:
    found, rest, is_complete = convert(GEMMA, cut(gemma(arguments)[1:] + "<tool_call|>", cuts))
    assert (json.loads(found), rest, is_complete) == (arguments, "<tool_call|>", True)


def test_names_may_have_spaces() -> None:
    assert convert(PYTHON, list("my city ='Rome', b={my key: 1})"))[0] == '{"my city": "Rome", "b": {"my key": 1}}'


@given(st.lists(st.sampled_from([*"='\"()[]{},: 1\\<a", "True"]), max_size=12).map("".join), CUTS)
def test_arguments_that_end_are_json_in_any_pieces(text: str, cuts: list[int]) -> None:
    """Text that is no literal ends the arguments and is left unread."""
    found, rest, is_complete = convert(PYTHON, [text])
    assert convert(PYTHON, cut(text, cuts))[::2] == convert(PYTHON, list(text) or [""])[::2] == (found, is_complete)
    if is_complete:
        assert isinstance(json.loads(found), dict)
        assert text.endswith(rest)


NEXT_TAG = "\n</parameter>\n<parameter=count>\n"
STREAMS = [
    (PYTHON, ["a", "='x", "y", "\\", "n", "'", ")"], ["{", '"a": "x', "y", "", "\\n", '"', "}"]),
    (
        PADDED,
        ["<parameter=text>", "\n", "ab", "\n", "</par", "ty", NEXT_TAG, "1", "2\n</parameter>"],
        ['{"text": "', "", "ab", "", "", "\\n</party", '", "count": ', "", "12"],
    ),
]


@pytest.mark.parametrize(("syntax", "pieces", "streamed"), STREAMS)
def test_what_is_streamed(syntax: Syntax, pieces: list[str], streamed: list[str]) -> None:
    """Strings are; between tags, other values are not."""
    reader = syntax.arguments_reader(syntax.prepare(SCHEMA))
    assert [reader.push(piece)[0] for piece in pieces] == streamed


# Types of values are those that a validator of JSON schemas accepts.

EXAMPLES: dict[str, list[Any]] = {
    **{"null": [None], "boolean": [True], "integer": [0, 1, 7], "number": [0.5]},
    **{"string": ["", "a", "b"], "array": [[], [1]], "object": [{}, {"a": 1}]},
}
ROOT: dict[str, Any] = {
    "$defs": {"name": {"type": "string"}, "a/b": {"$ref": "#/$defs/name"}, "loop": {"$ref": "#/$defs/loop"}}
}


TYPES = [
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


@pytest.mark.parametrize("schema", TYPES)
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
    assert ArgumentSchema(CHILDREN).parameter_types("children") == {"array"}


CHILDREN: dict[str, Any] = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}


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
        CHILDREN,
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


PYTHONIC = load_template("Llama-pythonic").tool_format
QWEN = ToolFormat("", before_name="<tool_call>\n<function=", after_name=">\n", arguments=PADDED)
REPEATED = [
    (QWEN, "<tool_call><function=f><parameter=a>", "\n</par"),
    (QWEN, "<tool_call><function=f>", "<parameter=a>1</parameter>"),
    (QWEN, "", "<tool_call><function=f"),
    (PYTHONIC, "[f(a='", "\\'"),
    (PYTHONIC, "[f(a=", "[1,"),
    (PYTHONIC, "", "[f(a=1),"),
]


@pytest.mark.long
@pytest.mark.checklist("C24")
@pytest.mark.parametrize(("format", "opening", "unit"), REPEATED)
def test_time_is_linear(format: ToolFormat, opening: str, unit: str) -> None:
    test_tool_parser.test_time_is_linear(format, opening, unit)


# The text before arguments is matched once it is decided what it is.


TEXT = f"<call>\nfunctions.{NAME}:{INDEX}<args>"


@pytest.mark.parametrize(
    "text", ["<call>\nfunctions.f-1:0<args>", "<call>functions.f-1:12 <args>", " <call> \n functions. f-1:0<args>"]
)
def test_white_space_is_free(text: str) -> None:
    match = Head(TEXT).match(text + "{")
    assert match is not None
    assert (match.end, match.slots[NAME]) == (len(text), "f-1")
    assert all(Head(TEXT).match(text[:end]) is UNDECIDED for end in range(len(text)))


def test_what_does_not_match() -> None:
    space = " " * MAX_HEAD_CHARS
    for text in (
        *("<x", "<call>functions.!", "<call>functions.f:x", "<call>functions.f:0<argz"),
        *(f"<call>{space}", f"<call>{space}functions.f:0<args>{{"),  # which are too long
    ):
        assert Head(TEXT).match(text) is None
