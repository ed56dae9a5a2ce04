"""Grammars of calls in the formats of real chat templates.

The parser reads every answer that a grammar allows as calls whose arguments are valid under the tools' schemas. Answers
are sampled at random from the tokens that the grammar's masks allow.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server.constrained.tool_grammar import ToolSchemaError, tool_grammar
from server.schemas.tools import Tool
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.tool_formats import KEY, TaggedArguments
from tests.server.constrained.test_tool_grammar import validated
from tests.support.examples import IS_LONG, num_examples
from tests.support.grammars import GrammarModel, calls_of
from tests.support.tiny_tokenizer_model import write_tiny_model
from tests.support.tool_templates import KINDS, NAMES, kinds_first, load_template

TOKEN = re.compile(r"<[^<>\s=\"]+>|\[[A-Z_]+\]|\]<\]minimax\[>\[")
POSITION = {"type": "object", "properties": {"x": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["x"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]?$"},
        "note": {"type": "string", "minLength": 2, "maxLength": 4},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
        "list": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "options": {
            "type": "object",
            "properties": {"k": {"type": "string", "maxLength": 3}, "inner": {"$ref": "#/$defs/position"}},
            "required": ["k"],
        },
        "position": {"$ref": "#/$defs/position"},
        "one": {"const": "x"},
        "level": {"enum": [1, 2, 3]},
    },
    "required": ["days", "note"],
    "$defs": {"position": POSITION},
}
ALL: dict[str, dict[str, Any]] = {"get_weather": SCHEMA, "time-now": {"type": "object", "properties": {}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


# In `make test-long` one template for each format that there is.
DISTINCT = list({repr(load_template(name).tool_format): name for name in NAMES}.values()) if IS_LONG else [*KINDS]


def make_tools(schemas: dict[str, Any] = ALL, *, strict: bool = False) -> list[Tool]:
    functions = [{"name": name, "parameters": schema, "strict": strict} for name, schema in schemas.items()]
    return [Tool.model_validate({"type": "function", "function": function}) for function in functions]


class Model(GrammarModel):
    """A vocabulary of bytes in which the tags of a format may be special tokens."""

    def __init__(self, name: str, folder: Path, *, special: bool = True) -> None:
        template = load_template(name)
        self.tool_format, self.content_markers = template.tool_format, template.reasoning.content_markers
        self.format = self.new_format()
        special = special or template.tool_format.name == "minimax_m3"  # random text seldom ends with its token
        tags = sorted(set(TOKEN.findall("\n".join(self.format.markers)))) if special else []
        super().__init__(write_tiny_model(folder, *tags))
        self.special_ids = self.tokenizer.special_ids_in(self.format.markers)
        syntax = template.tool_format.arguments
        tags = [syntax.after_value, syntax.value_end] if isinstance(syntax, TaggedArguments) else [*syntax.texts]
        self.ends = ['"', *(text for text in tags if KEY not in text)]

    def new_format(self, schemas: dict[str, Any] = ALL, parallel: bool = True) -> AnswerFormat:
        return AnswerFormat(self.tool_format, schemas, parallel, content_markers=self.content_markers)

    def grammar(self, tools: list[Tool], choice: Any, *, parallel: bool = True) -> str:
        format = self.new_format(parallel=parallel)
        grammar = tool_grammar(format, tools, validated(choice), special_ids=self.special_ids)
        assert grammar is not None
        return grammar

    def samples(self, grammar: str, rng: random.Random, num: int = 1) -> Iterator[str]:
        matcher = self.matcher(grammar)
        for _ in range(num):
            yield self.sample(matcher.deep_copy(), rng, self.ends)

    def parse(
        self, text: str, schemas: dict[str, Any] = ALL, *, parallel: bool = True
    ) -> tuple[list[AnswerPart], AnswerParser]:
        parser = AnswerParser(self.new_format(schemas, parallel), hidden=(*self.content_markers, *self.special_ids))
        return parser.push(text) + parser.finish(), parser


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@kinds_first(DISTINCT)
def test_the_parser_reads_what_the_grammar_allows(name: str, special: bool, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path, special=special)
    for choice, parallel in [("required", True), ("required", False), (NAMED, True)]:
        grammar = model.grammar(make_tools(), choice, parallel=parallel)
        for text in model.samples(grammar, rng, num_examples(1, 20)):
            parts, parser = model.parse(text, parallel=parallel)
            assert not any(part.kind is PartKind.CONTENT for part in parts), text
            assert parser.ends_with_calls, text
            calls = calls_of(parts)
            for tool, arguments in calls:
                jsonschema.validate(arguments, ALL[tool])
            assert len(calls) == 1 or (parallel and choice == "required"), text


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@kinds_first(DISTINCT)
def test_strict_calls_are_optional(name: str, special: bool, tmp_path: Path, rng: random.Random) -> None:
    """Free text is allowed, and calls in it follow their schemas, however they begin."""
    model = Model(name, tmp_path, special=special)
    (call,) = model.samples(model.grammar(make_tools(), NAMED), rng)
    grammar = model.grammar(make_tools(strict=True), None)
    assert all(model.accepts(grammar, text) for text in ("", "Hello, world!\n", "a < b", call))
    assert not model.accepts(grammar, call.replace("get_weather", "get_whatever"))
    for text in model.samples(grammar, rng, num_examples(2, 20)):
        for tool, arguments in calls_of(model.parse(text)[0]):
            jsonschema.validate(arguments, ALL[tool])


def test_content_after_a_marker_that_begins_as_calls_do(tmp_path: Path, rng: random.Random) -> None:
    """Muse addresses content `to=user` and calls `to=get_weather`."""
    model = Model("muse-glimmer", tmp_path)
    (call,) = model.samples(model.grammar(make_tools(), NAMED), rng)
    call = call.removeprefix("to=user<|message|>")
    grammar = model.grammar(make_tools(strict=True), None)
    for text in ("", "Hi", call, f"Hi {call}"):
        assert model.accepts(grammar, text)
        assert model.accepts(grammar, f"to=user<|message|>{text}")
    assert not model.accepts(grammar, "to=else<|message|>Hi")


@kinds_first(DISTINCT)
def test_arguments_of_tools_that_are_not_strict_are_free(name: str, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    tools = [*make_tools({"get_weather": SCHEMA}), *make_tools({"time-now": ALL["time-now"]}, strict=True)]
    if model.tool_format.name != "minimax_m3":  # which does not support further properties
        for text in model.samples(model.grammar(tools, None), rng, num_examples(2, 20)):
            assert all(isinstance(arguments, dict) for _, arguments in calls_of(model.parse(text)[0])), text


MORE: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "additionalProperties": {"type": "boolean"},
}
EITHER: dict[str, Any] = {
    "anyOf": [
        {"properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind", "n"]},
        {"properties": {"kind": {"const": "b"}}, "required": ["kind"]},
    ]
}
NODE = {"properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["n"]}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"tree": {"$ref": "#/$defs/node"}},
    "required": ["tree"],
    "$defs": {"node": {"type": "object"} | NODE},
}
CLOSED = {"type": "object", "required": ["n"], "additionalProperties": False}
WHOLE_TREE: dict[str, Any] = CLOSED | {
    "properties": {"n": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}}
}
CIRCLE: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/a"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {
        "a": CLOSED | {"properties": {"n": {"type": "integer"}, "b": {"$ref": "#/$defs/b"}}},
        "b": CLOSED | {"properties": {"n": {"type": "integer"}, "a": {"$ref": "#/properties/a"}}},
        "unused": {"const": "x" * 100_000},
    },
}
RECURSIVE = (WHOLE_TREE, CIRCLE)


@pytest.mark.parametrize("name", ["Qwen3-Coder", "google-gemma-4-31B-it", "Kimi-K3", "MiniMax-M3"])
@pytest.mark.parametrize(
    "schema", [MORE, EITHER, TREE, WHOLE_TREE, CIRCLE], ids=["more", "either", "tree", "whole", "circle"]
)
def test_other_schemas(name: str, schema: dict[str, Any], tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    if name == "MiniMax-M3" and schema not in RECURSIVE:  # further properties are not supported
        return
    grammar = model.grammar(make_tools({"get_weather": schema}), "required", parallel=False)
    for text in model.samples(grammar, rng, num_examples(3, 30)):
        ((_, arguments),) = calls_of(model.parse(text, {"get_weather": schema})[0])
        jsonschema.validate(arguments, schema)


def test_values_are_written_as_the_model_does(tmp_path: Path) -> None:
    model = Model("Qwen3-Coder", tmp_path)
    grammar = model.grammar(make_tools({"get_weather": SCHEMA}), "required")

    def call(**values: str) -> str:
        values = {"note": "ab", "days": "3"} | values
        names = [each for each in SCHEMA["properties"] if each in values]
        arguments = "".join(f"<parameter={each}>\n{values[each]}\n</parameter>\n" for each in names)
        return f"<tool_call>\n<function=get_weather>\n{arguments}</function>\n</tool_call>"

    for allowed in ({}, {"city": 'a "b"\n<c>'}, {"city": ""}, {"code": "CH1"}, {"maybe": "null"}, {"list": "[1, 2]"}):
        assert model.accepts(grammar, call(**allowed)), allowed
    refused = [("days", "x"), ("days", "15"), ("note", "a"), ("note", "abcde"), ("code", "ch"), ("unit", "kelvin")]
    refused += [("list", "[1, 2, 3]"), ("flag", "yes"), ("one", "y"), ("level", "4"), ("position", "{}")]
    for name, value in refused:
        assert not model.accepts(grammar, call(**{name: value})), (name, value)


UNSUPPORTED = [
    ({"type": "object", "patternProperties": {"^a": {}}}, "'patternProperties' is not supported"),
    ({"type": "object", "properties": {"a<b": {"type": "string"}}}, "the name 'a<b' is not supported"),
    ({"type": "object", "properties": {"a": {"enum": ["\n</parameter>"]}}}, "none of the values of 'enum'"),
    ({"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}, "property 'a' is not"),
]


@pytest.mark.parametrize(("schema", "message"), UNSUPPORTED)
def test_schemas_that_no_call_can_follow(schema: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = Model("Qwen3-Coder", tmp_path, special=False)
    with pytest.raises(ToolSchemaError, match=message) as error:
        model.grammar(make_tools({"time-now": ALL["time-now"], "get_weather": schema}), "required")
    assert error.value.name == "get_weather"
