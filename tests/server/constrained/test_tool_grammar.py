"""Grammars of tool calls: llguidance compiles them, and the parser reads what they allow."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import TypeAdapter

from server.constrained.constraints import COMPACT
from server.constrained.harmony_grammar import harmony_grammar
from server.constrained.tool_grammar import ToolSchemaError, tool_grammar
from server.schemas.tools import Tool, ToolChoice
from server.text.parsers import tool_formats
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.harmony import MARKERS, HarmonyFormat
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, HERMES, KEY, LLAMA3, TaggedArguments, ToolFormat
from tests.support.examples import IS_LONG, num_examples
from tests.support.grammars import GrammarModel, calls_of
from tests.support.harmony import write_harmony_model
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID, write_tiny_model
from tests.support.tool_model import write_tool_model
from tests.support.tool_templates import KINDS, NAMES, kinds_first, load_template

THINK = ReasoningTags("<think>", "</think>")
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "pattern": "^[a-z]{1,5}$"}},
}
PARIS, BERN = '{"city": "paris"}', '{"city": "bern", "days": 3}'


SCHEMAS: dict[str, Any] = {"weather": CITY, "time": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GrammarModel:
    return GrammarModel(write_tool_model(tmp_path_factory.mktemp("grammar"), special_tags=request.param == "special"))


def make_tools(*, strict: bool = False) -> list[Tool]:
    functions = [{"name": "weather", "parameters": CITY, "strict": strict}, {"name": "time"}]
    return [Tool.model_validate({"type": "function", "function": function}) for function in functions]


def validated(choice: Any) -> ToolChoice | None:
    return None if choice is None else TypeAdapter[ToolChoice](ToolChoice).validate_python(choice)


def grammar_of(
    model: GrammarModel, format: ToolFormat, choice: Any = None, strict: bool = False, more: bool = False, **fields: Any
) -> str:
    special_ids = model.tokenizer.special_ids_in([*format.texts, THINK.start, THINK.end])
    answers, tools = AnswerFormat(format, **fields), make_tools(strict=strict)
    grammar = tool_grammar(answers, tools, validated(choice), special_ids=special_ids, has_content_grammar=more)
    assert grammar is not None
    return grammar


def with_content(calls: str) -> str:
    """Return the grammar of calls together with one of content, which calls look like at their beginning."""
    properties = {"name": {"type": "string"}, "answer": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["answer"], "additionalProperties": False}
    content = {"name": "content", "json_schema": schema | {"x-guidance": COMPACT}}
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": calls}, content]})


def write(format: ToolFormat, *calls: tuple[str, str]) -> str:
    """Return calls as models write them."""
    texts = [format.before_name + name + format.after_name + args + format.after_arguments for name, args in calls]
    text = format.separator.join(texts)
    return text if format is GENERIC and len(calls) == 1 else format.start + text + format.end


FORMATS = pytest.mark.parametrize(
    "format", [HERMES, LLAMA3, tool_formats.MISTRAL, tool_formats.MISTRAL_NAMES, GENERIC], ids=lambda f: f.name
)
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
REQUIRED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}


def read(format: ToolFormat, text: str, parallel: bool) -> Any:
    """Return the calls that an answer consists of, as the parser reads them."""
    parser = AnswerParser(AnswerFormat(format, {name: {} for name in SCHEMAS}, parallel_calls=parallel))
    parts = parser.push(text) + parser.finish()
    assert parser.ends_with_calls
    assert not any(part.kind is PartKind.CONTENT for part in parts)
    return calls_of(parts)


@FORMATS
def test_forced_calls(model: GrammarModel, format: ToolFormat) -> None:
    one, other = ("weather", PARIS), ("time", "{}")
    wrong = ["", "Hello", write(format, ("weather", "{}")), write(format, ("zzz", "{}")), write(format, one) + "x"]
    wrong += [write(format, ("weather", '{"city": "paris", "x": 1}')), write(format, ("time", '{"a": 1}'))]
    for choice, parallel, allowed, refused in [
        ("required", True, [[one], [other], [one, other, one]], []),
        ("required", False, [[one], [other]], [[one, other]]),
        (WEATHER, True, [[one], [("weather", BERN)]], [[other], [one, one]]),
        (REQUIRED, True, [[one], [one, one]], [[other]]),
    ]:
        grammar = grammar_of(model, format, choice, parallel_calls=parallel)
        for calls in allowed:
            text = write(format, *calls)
            assert model.accepts(grammar, text), (choice, text)
            assert read(format, text, parallel) == [(name, json.loads(arguments)) for name, arguments in calls]
        assert not any(model.accepts(grammar, write(format, *calls)) for calls in refused), (choice, refused)
        assert not any(model.accepts(grammar, text) for text in wrong), choice


@FORMATS
def test_strict_calls_of_an_answer_that_is_free(model: GrammarModel, format: ToolFormat) -> None:
    grammar = grammar_of(model, format, strict=True)
    one, wrong = write(format, ("weather", PARIS)), write(format, ("weather", "{}"))
    assert all(model.accepts(grammar, text) for text in ("", "Hello, world!\n", "<b>", one))
    assert not any(model.accepts(grammar, text) for text in (wrong, one + "x", one[:-1]))
    if not format.is_bare:
        assert model.accepts(grammar, f"One moment.\n{one}")
        assert not model.accepts(grammar, f"One moment.\n{wrong}")
    assert model.accepts(grammar, write(format, ("time", '{"a": 1}')))  # this tool is not strict
    two = write(format, ("weather", BERN), ("time", "{}"))
    assert model.accepts(grammar, two)
    assert not model.accepts(grammar_of(model, format, strict=True, parallel_calls=False), two)


def test_reasoning_comes_first(model: GrammarModel) -> None:
    call, other = write(HERMES, ("weather", PARIS)), "<tool_call>\nhm\n</tool_call>"
    for strict, choice in [(False, "required"), (True, None)]:
        for is_reasoning in (False, True):
            grammar = grammar_of(model, HERMES, choice, strict=strict, reasoning_tags=THINK, is_reasoning=is_reasoning)
            start = "" if is_reasoning else "<think>"
            could = "" if model.tokenizer.special_ids_in(["<tool_call>"]) else other  # special tokens do not match text
            for text in ("</think>\n\n", f"I could {could}</think>", "\n</think>\n"):
                assert model.accepts(grammar, start + text + call)
                assert model.accepts(grammar, start + text) == (choice is None)
            assert not model.accepts(grammar, f"{start}Hm</think>{other}")
            assert model.accepts(grammar, call) != is_reasoning


@FORMATS
def test_content_has_a_grammar_of_its_own(model: GrammarModel, format: ToolFormat) -> None:
    def grammar(choice: str, **more: Any) -> str:
        return with_content(grammar_of(model, format, choice, more=True, **more))

    call = write(format, ("time", '{"a": 1}'))
    free, forced, alone = grammar("auto"), grammar("required"), grammar("none", reasoning_tags=THINK)
    assert all(model.accepts(free, text) for text in ('{"answer":42}', '{"name":"time","answer":42}', call))
    assert not any(model.accepts(free, text) for text in ("Hi", '{"answer":"x"}', "", call + '{"answer":42}'))
    assert not model.accepts(forced, '{"answer":42}')
    assert model.accepts(forced, write(format, ("time", "{}")))
    assert model.accepts(alone, '{"answer":42}')
    assert model.accepts(alone, '<think>\nHm\n</think>\n\n{"answer":42}')
    assert not model.accepts(alone, call)


def test_what_needs_no_grammar() -> None:
    for tools, choice in (
        (make_tools(), None),
        (make_tools(), "auto"),
        (make_tools(strict=True), "none"),
        (None, None),
    ):
        assert tool_grammar(AnswerFormat(HERMES, parallel_calls=False), tools, validated(choice)) is None
        assert harmony_grammar(HarmonyFormat(), tools, validated(choice)) is None


def test_json_cannot_break_the_grammar(model: GrammarModel) -> None:
    """Text in a schema cannot break out of its JSON string."""
    schema = {"type": "object", "properties": {'a"\n/\\': {"enum": ['x"\nstart: y', "é", "</tool_call>"]}}}
    function = {"name": "f", "parameters": schema}
    tools = [Tool.model_validate({"type": "function", "function": function})]
    grammar = tool_grammar(AnswerFormat(HERMES), tools, "required")
    assert grammar is not None
    for value in ('x"\nstart: y', "é"):
        arguments = json.dumps({'a"\n/\\': value}, ensure_ascii=False)
        if not model.tokenizer.special_ids_in(["<tool_call>"]):
            assert model.accepts(grammar, write(HERMES, ("f", arguments)))


# The harmony format.


NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm <b>.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me\nsee.<|end|>{NEXT}"
FINAL = "<|channel|>final<|message|>"


@pytest.fixture(scope="module", params=["plain", "special"])
def harmony(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GrammarModel:
    folder = tmp_path_factory.mktemp("harmony")
    return GrammarModel(write_harmony_model(folder, special_markers=request.param == "special"))


def grammar_in(
    harmony: GrammarModel, choice: Any = None, *, strict: bool = False, more: bool = False, is_final: bool = False
) -> str:
    format, special_ids = HarmonyFormat(is_final=is_final), harmony.tokenizer.special_ids_in(MARKERS)
    tools = make_tools(strict=strict)
    grammar = harmony_grammar(format, tools, validated(choice), special_ids=special_ids, has_content_grammar=more)
    assert grammar is not None
    return grammar


def calling(name: str, arguments: str, content_type: str = " <|constrain|>json", is_role_first: bool = False) -> str:
    recipient, channel = f" to=functions.{name}", "<|channel|>commentary"
    header = recipient + channel if is_role_first else channel + recipient
    return f"{header}{content_type}<|message|>{arguments}"


def test_forced_calls_in_harmony(harmony: GrammarModel) -> None:
    wrong = [
        "",
        "Hi",
        f"{FINAL}Hi",
        ANALYSIS,
        calling("weather", "{}"),
        calling("zzz", "{}"),
        calling("time", "{}") + "x",
    ]
    wrong += [calling("weather", PARIS) + f"<|call|>{NEXT}" + calling("time", "{}"), calling("time", '{"a": 1}')]
    for choice, allowed, refused in [
        ("required", [calling("weather", PARIS), calling("time", "{}")], []),
        (WEATHER, [calling("weather", BERN)], [calling("time", "{}")]),
        (REQUIRED, [calling("weather", BERN)], [calling("time", "{}")]),
    ]:
        grammar = grammar_in(harmony, choice)
        for before in ("", ANALYSIS, PREAMBLE, ANALYSIS + PREAMBLE + ANALYSIS):
            for text in allowed:
                assert harmony.accepts(grammar, before + text), choice
                parser = HarmonyFormat(tools={name: {} for name in SCHEMAS}).new_parser()
                ((name, arguments),) = calls_of(parser.push(before + text) + parser.finish())
                assert parser.ends_with_calls
                assert calling(name, json.dumps(arguments)) == text
            assert not any(harmony.accepts(grammar, before + text) for text in [*wrong, *refused]), choice
    grammar = grammar_in(harmony, "required")
    for content_type in (" <|constrain|>json", "<|constrain|>json", " json", ""):
        for is_role_first in (False, True):
            text = calling("time", "{}", content_type, is_role_first)
            assert harmony.accepts(grammar, text), text
            spaced = re.sub(r"(<\|(start|channel|message|constrain)\|>)", r"\1 ", ANALYSIS + text)
            assert harmony.accepts(grammar, spaced), spaced


def test_strict_calls_of_an_answer_that_is_free_in_harmony(harmony: GrammarModel) -> None:
    grammar = grammar_in(harmony, strict=True)
    for before in ("", ANALYSIS, PREAMBLE):
        for text in (FINAL, f"{FINAL}Hello,\nworld!", calling("weather", PARIS), calling("time", '{"a": 1}')):
            assert harmony.accepts(grammar, before + text), text
        assert not harmony.accepts(grammar, before + calling("weather", "{}"))


def test_content_has_a_grammar_of_its_own_in_harmony(harmony: GrammarModel) -> None:
    def grammar(choice: str, **more: bool) -> str:
        return with_content(grammar_in(harmony, choice, more=True, **more))

    free, forced, alone = grammar("auto"), grammar("required"), grammar("none")
    answer, time = '{"answer":42}', calling("time", '{"a": 1}')
    typed = f"<|channel|>final <|constrain|>json<|message|>{answer}"
    for before in ("", ANALYSIS, ANALYSIS + ANALYSIS):
        assert all(harmony.accepts(free, before + text) for text in (FINAL + answer, typed, time))
        assert not any(harmony.accepts(free, before + text) for text in (answer, f"{FINAL}Hi", f"{FINAL}{answer}x"))
        assert harmony.accepts(alone, before + FINAL + answer)
        assert not harmony.accepts(alone, before + time)
        assert harmony.accepts(forced, before + calling("time", "{}"))
        assert not harmony.accepts(forced, before + FINAL + answer)
    assert not harmony.accepts(free, PREAMBLE + FINAL + answer)  # it would be content
    assert harmony.accepts(grammar("none", is_final=True), answer)


REQUIRE: dict[str, Any] = {"choice": "required"}
STRICT: dict[str, Any] = {"strict": True}


def test_answers_that_the_prompt_begins(harmony: GrammarModel) -> None:
    forced, strict = (grammar_in(harmony, is_final=True, **more) for more in (REQUIRE, STRICT))
    text = f"lo.<|end|>{NEXT}" + calling("time", "{}")
    assert harmony.accepts(forced, text)
    assert not harmony.accepts(forced, "lo.")
    assert all(harmony.accepts(strict, each) for each in (text, "lo."))


def test_a_call_ends_with_a_token_that_ends_the_answer(harmony: GrammarModel) -> None:
    ends = list(harmony.tokenizer.special_ids_in(["<|call|>", "<|return|>"]).values())
    guide = LLTokenizer(harmony.tokenizer.to_json(), eos_token=ends or [END_OF_TEXT_ID])
    matcher = LLMatcher(guide, grammar_in(harmony, "required"), log_level=0)
    matcher.consume_tokens(harmony.tokenizer.encode(calling("time", "{}"), add_special_tokens=False))
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    allowed = [token_id for token_id in range(harmony.tokenizer.vocab_size) if mask >> token_id & 1]
    assert allowed == (sorted(ends) or [END_OF_TEXT_ID])


# The formats of real chat templates. Answers are sampled at random from the tokens that the masks allow.


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


def tools_of(schemas: dict[str, Any] = ALL, *, strict: bool = False) -> list[Tool]:
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
        grammar = model.grammar(tools_of(), choice, parallel=parallel)
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
    (call,) = model.samples(model.grammar(tools_of(), NAMED), rng)
    grammar = model.grammar(tools_of(strict=True), None)
    assert all(model.accepts(grammar, text) for text in ("", "Hello, world!\n", "a < b", call))
    assert not model.accepts(grammar, call.replace("get_weather", "get_whatever"))
    for text in model.samples(grammar, rng, num_examples(2, 20)):
        for tool, arguments in calls_of(model.parse(text)[0]):
            jsonschema.validate(arguments, ALL[tool])


def test_content_after_a_marker_that_begins_as_calls_do(tmp_path: Path, rng: random.Random) -> None:
    """Muse addresses content `to=user` and calls `to=get_weather`."""
    model = Model("muse-glimmer", tmp_path)
    (call,) = model.samples(model.grammar(tools_of(), NAMED), rng)
    call = call.removeprefix("to=user<|message|>")
    grammar = model.grammar(tools_of(strict=True), None)
    for text in ("", "Hi", call, f"Hi {call}"):
        assert model.accepts(grammar, text)
        assert model.accepts(grammar, f"to=user<|message|>{text}")
    assert not model.accepts(grammar, "to=else<|message|>Hi")


@kinds_first(DISTINCT)
def test_arguments_of_tools_that_are_not_strict_are_free(name: str, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    tools = [*tools_of({"get_weather": SCHEMA}), *tools_of({"time-now": ALL["time-now"]}, strict=True)]
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
    grammar = model.grammar(tools_of({"get_weather": schema}), "required", parallel=False)
    for text in model.samples(grammar, rng, num_examples(3, 30)):
        ((_, arguments),) = calls_of(model.parse(text, {"get_weather": schema})[0])
        jsonschema.validate(arguments, schema)


def test_values_are_written_as_the_model_does(tmp_path: Path) -> None:
    model = Model("Qwen3-Coder", tmp_path)
    grammar = model.grammar(tools_of({"get_weather": SCHEMA}), "required")

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
        model.grammar(tools_of({"time-now": ALL["time-now"], "get_weather": schema}), "required")
    assert error.value.name == "get_weather"
