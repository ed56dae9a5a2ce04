"""Grammars of tool calls: llguidance compiles them, and the parser reads what they allow."""

import json
import random
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher
from pydantic import TypeAdapter

from engine.grammar.compiler import GrammarCompiler
from server.constrained.constraints import COMPACT
from server.constrained.harmony_grammar import harmony_grammar
from server.constrained.tool_grammar import ToolSchemaError, tool_grammar
from server.schemas.tools import Tool, ToolChoice
from server.text.parsers import tool_formats
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.harmony import HARMONY, MARKERS, HarmonyFormat
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, HERMES, KEY, LLAMA3, TaggedArguments, ToolFormat
from server.text.tokenizer import Tokenizer
from tests.support.examples import IS_LONG, num_examples
from tests.support.grammars import allows, compiler_of
from tests.support.parsing import Answer, read_answer
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID, write_tiny_model
from tests.support.tool_model import TAGS
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


TOOLS: dict[str, Any] = {"weather": CITY, "time": None}


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of bytes, in which the markers of several formats may be special tokens."""
    special = (*TAGS, *MARKERS) if request.param == "special" else ()
    return Tokenizer.from_model(write_tiny_model(tmp_path_factory.mktemp("grammar"), *special))


def tools_of(schemas: dict[str, Any], strict: Collection[str] = ()) -> list[Tool]:
    functions = [{"name": name, "parameters": schemas[name], "strict": name in strict} for name in schemas]
    return [Tool.model_validate({"type": "function", "function": function}) for function in functions]


def validated(choice: Any) -> ToolChoice | None:
    return None if choice is None else TypeAdapter[ToolChoice](ToolChoice).validate_python(choice)


def grammar_of(
    model: Tokenizer, format: ToolFormat, choice: Any = None, strict: bool = False, more: bool = False, **fields: Any
) -> str:
    answers = HarmonyFormat(**fields) if format is HARMONY else AnswerFormat(format, **fields)
    special_ids = model.special_ids_in([*answers.markers, *format.texts, THINK.start, THINK.end])
    options: dict[str, Any] = {"special_ids": special_ids, "has_content_grammar": more}
    tools, choice = tools_of(TOOLS, ["weather"] if strict else []), validated(choice)
    grammar = (
        harmony_grammar(answers, tools, choice, **options)
        if isinstance(answers, HarmonyFormat)
        else tool_grammar(answers, tools, choice, **options)
    )
    assert grammar is not None
    return grammar


def with_content(calls: str) -> str:
    """Return the grammar of calls together with one of content, which calls look like at their beginning."""
    properties = {"name": {"type": "string"}, "answer": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["answer"], "additionalProperties": False}
    content = {"name": "content", "json_schema": schema | {"x-guidance": COMPACT}}
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": calls}, content]})


NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm <b>.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me\nsee.<|end|>{NEXT}"
FINAL = "<|channel|>final<|message|>"


def calling(name: str, arguments: str, content_type: str = " <|constrain|>json", is_role_first: bool = False) -> str:
    """Return a call in the harmony format."""
    recipient, channel = f" to=functions.{name}", "<|channel|>commentary"
    header = recipient + channel if is_role_first else channel + recipient
    return f"{header}{content_type}<|message|>{arguments}"


def write(format: ToolFormat, *calls: tuple[str, str]) -> str:
    """Return calls as models write them."""
    if format is HARMONY:
        return f"<|call|>{NEXT}".join(calling(*call) for call in calls)
    texts = [format.before_name + name + format.after_name + args + format.after_arguments for name, args in calls]
    text = format.separator.join(texts)
    return text if format is GENERIC and len(calls) == 1 else format.start + text + format.end


FORMATS = pytest.mark.parametrize(
    "format", [HERMES, LLAMA3, tool_formats.MISTRAL, tool_formats.MISTRAL_NAMES, GENERIC, HARMONY], ids=lambda f: f.name
)
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
REQUIRED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}


def earlier(format: ToolFormat) -> list[str]:
    """Return what may stand before an answer: messages of the harmony format."""
    return ["", ANALYSIS, PREAMBLE, ANALYSIS + PREAMBLE + ANALYSIS] if format is HARMONY else [""]


def content_of(format: ToolFormat, text: str) -> str:
    return FINAL + text if format is HARMONY else text


def read(format: ToolFormat, text: str, parallel: bool) -> Any:
    """Return the calls that an answer consists of, as the parser reads them."""
    tools: dict[str, Any] = {name: {} for name in TOOLS}
    answers = HarmonyFormat(tools=tools) if format is HARMONY else AnswerFormat(format, tools, parallel)
    parser = answers.new_parser()
    answer = read_answer(parser, [text])
    assert parser.ends_with_calls
    assert (answer.content != "") == (PREAMBLE in text)
    return answer.decoded


@FORMATS
def test_forced_calls(model: Tokenizer, format: ToolFormat) -> None:
    """Of several calls, the harmony format has one in an answer."""
    one, other = ("weather", PARIS), ("time", "{}")
    wrong = ["", "Hello", write(format, ("weather", "{}")), write(format, ("zzz", "{}")), write(format, one) + "x"]
    wrong += [write(format, ("weather", '{"city": "paris", "x": 1}')), write(format, ("time", '{"a": 1}'))]
    wrong += [f"{FINAL}Hi", ANALYSIS] if format is HARMONY else []
    for choice, parallel, possible, refused in [
        ("required", True, [[one], [other], [one, other, one]], []),
        ("required", False, [[one], [other], [one, other]], []),
        (WEATHER, True, [[one], [("weather", BERN)]], [[other], [one, one]]),
        (REQUIRED, True, [[one], [one, one]], [[other]]),
    ]:
        grammar = grammar_of(model, format, choice, parallel_calls=parallel)
        for before in earlier(format):
            for calls in possible:
                text = before + write(format, *calls)
                is_allowed = len(calls) == 1 or (parallel and format is not HARMONY)
                assert allows(model, grammar, text) == is_allowed, (choice, text)
                if is_allowed:
                    assert read(format, text, parallel) == [(name, json.loads(args)) for name, args in calls]
            for text in [*wrong, *(write(format, *calls) for calls in refused)]:
                assert not allows(model, grammar, before + text), (choice, text)


@FORMATS
def test_strict_calls_of_an_answer_that_is_free(model: Tokenizer, format: ToolFormat) -> None:
    grammar = grammar_of(model, format, strict=True)
    one, wrong = write(format, ("weather", PARIS)), write(format, ("weather", "{}"))
    loose = write(format, ("time", '{"a": 1}'))  # this tool is not strict
    for before in [*earlier(format), *([] if format.is_bare or format is HARMONY else ["One moment.\n"])]:
        allowed = [one, loose, *(content_of(format, text) for text in ("", "Hello,\nworld!\n", "<b>"))]
        assert all(allows(model, grammar, before + text) for text in allowed)
        assert not any(allows(model, grammar, before + text) for text in (wrong, one + "x", one[:-1]))
    two = write(format, ("weather", BERN), ("time", "{}"))
    assert allows(model, grammar, two) == (format is not HARMONY)
    assert not allows(model, grammar_of(model, format, strict=True, parallel_calls=False), two)


def test_reasoning_comes_first(model: Tokenizer) -> None:
    call, other = write(HERMES, ("weather", PARIS)), "<tool_call>\nhm\n</tool_call>"
    for strict, choice in [(False, "required"), (True, None)]:
        for is_reasoning in (False, True):
            grammar = grammar_of(model, HERMES, choice, strict=strict, reasoning_tags=THINK, is_reasoning=is_reasoning)
            start = "" if is_reasoning else "<think>"
            could = "" if model.special_ids_in(["<tool_call>"]) else other  # special tokens do not match text
            for text in ("</think>\n\n", f"I could {could}</think>", "\n</think>\n"):
                assert allows(model, grammar, start + text + call)
                assert allows(model, grammar, start + text) == (choice is None)
            assert not allows(model, grammar, f"{start}Hm</think>{other}")
            assert allows(model, grammar, call) != is_reasoning


@FORMATS
def test_content_has_a_grammar_of_its_own(model: Tokenizer, format: ToolFormat) -> None:
    def grammar(choice: str, **more: Any) -> str:
        return with_content(grammar_of(model, format, choice, more=True, **more))

    answer, call = content_of(format, '{"answer":42}'), write(format, ("time", '{"a": 1}'))
    free, forced = grammar("auto"), grammar("required")
    alone = grammar("none", **({} if format is HARMONY else {"reasoning_tags": THINK}))
    for before in [each for each in earlier(format) if PREAMBLE not in each]:
        named = content_of(format, '{"name":"time","answer":42}')
        assert all(allows(model, free, before + text) for text in (answer, named, call))
        wrong = [content_of(format, text) for text in ("Hi", '{"answer":"x"}', '{"answer":42}x')]
        assert not any(allows(model, free, before + text) for text in (*wrong, "", call + answer))
        assert not allows(model, forced, before + answer)
        assert allows(model, forced, before + write(format, ("time", "{}")))
        assert allows(model, alone, before + answer)
        assert not allows(model, alone, before + call)
    if format is not HARMONY:
        assert allows(model, alone, '<think>\nHm\n</think>\n\n{"answer":42}')
        return
    assert allows(model, free, '<|channel|>final <|constrain|>json<|message|>{"answer":42}')
    assert not allows(model, free, PREAMBLE + answer)  # the preamble would be content
    assert not allows(model, free, '{"answer":42}')
    assert allows(model, grammar("none", is_final=True), '{"answer":42}')


def test_what_needs_no_grammar() -> None:
    for tools, choice in (
        (tools_of(TOOLS), None),
        (tools_of(TOOLS), "auto"),
        (tools_of(TOOLS, TOOLS), "none"),
        (None, None),
    ):
        assert tool_grammar(AnswerFormat(HERMES, parallel_calls=False), tools, validated(choice)) is None
        assert harmony_grammar(HarmonyFormat(), tools, validated(choice)) is None


def test_json_cannot_break_the_grammar(model: Tokenizer) -> None:
    """Text in a schema cannot break out of its JSON string."""
    schema = {"type": "object", "properties": {'a"\n/\\': {"enum": ['x"\nstart: y', "é", "</tool_call>"]}}}
    grammar = tool_grammar(AnswerFormat(HERMES), tools_of({"f": schema}), "required")
    assert grammar is not None
    for value in ('x"\nstart: y', "é"):
        arguments = json.dumps({'a"\n/\\': value}, ensure_ascii=False)
        if not model.special_ids_in(["<tool_call>"]):
            assert allows(model, grammar, write(HERMES, ("f", arguments)))


# The harmony format.


def test_headers_of_calls(model: Tokenizer) -> None:
    grammar = grammar_of(model, HARMONY, "required")
    for content_type in (" <|constrain|>json", "<|constrain|>json", " json", ""):
        for is_role_first in (False, True):
            text = calling("time", "{}", content_type, is_role_first)
            assert allows(model, grammar, text), text
            spaced = re.sub(r"(<\|(start|channel|message|constrain)\|>)", r"\1 ", ANALYSIS + text)
            assert allows(model, grammar, spaced), spaced


def test_answers_that_the_prompt_begins(model: Tokenizer) -> None:
    forced = grammar_of(model, HARMONY, "required", is_final=True)
    strict = grammar_of(model, HARMONY, strict=True, is_final=True)
    text = f"lo.<|end|>{NEXT}" + calling("time", "{}")
    assert allows(model, forced, text)
    assert not allows(model, forced, "lo.")
    assert all(allows(model, strict, each) for each in (text, "lo."))


def test_a_call_ends_with_a_token_that_ends_the_answer(model: Tokenizer) -> None:
    ends = sorted(model.special_ids_in(["<|call|>", "<|return|>"]).values()) or [END_OF_TEXT_ID]
    matcher = GrammarCompiler(model.to_json(), ends).compile(grammar_of(model, HARMONY, "required"))
    matcher.consume_tokens(model.encode(calling("time", "{}"), add_special_tokens=False))
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    assert [token_id for token_id in range(model.vocab_size) if mask >> token_id & 1] == ends


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


def sample(tokenizer: Tokenizer, matcher: LLMatcher, rng: random.Random, ends: Sequence[str]) -> str:
    """Return a random output. Texts that end values, `ends`, are tried often, so that strings end."""
    tried = [tokenizer.encode(text, add_special_tokens=False) for text in ends]
    token_ids: list[int] = []
    while not matcher.is_stopped():
        assert len(token_ids) < 5000
        end = rng.choice(tried)
        if rng.random() < 0.3 and len(end) == matcher.validate_tokens(end):
            assert matcher.consume_tokens(end)
            token_ids += end
            continue
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token_id for token_id in range(tokenizer.vocab_size) if mask >> token_id & 1]
        closing = [each for each in allowed if each > END_OF_TEXT_ID or each in (*b'"<\n',)]
        token_id = rng.choice(closing if closing and rng.random() < len(token_ids) / 200 else allowed)
        token_id = END_OF_TEXT_ID if END_OF_TEXT_ID in allowed and rng.random() < 0.5 else token_id
        assert matcher.consume_token(token_id)
        token_ids.append(token_id)
    assert not matcher.is_error(), matcher.get_error()
    return tokenizer.decode([each for each in token_ids if each != END_OF_TEXT_ID], skip_special_tokens=False)


class Model:
    """A vocabulary of bytes in which the tags of a format may be special tokens."""

    def __init__(self, name: str, folder: Path, *, special: bool = True) -> None:
        template = load_template(name)
        self.tool_format, self.content_markers = template.tool_format, template.reasoning.content_markers
        self.format = self.new_format()
        special = special or template.tool_format.name == "minimax_m3"  # random text seldom ends with its token
        tags = sorted(set(TOKEN.findall("\n".join(self.format.markers)))) if special else []
        self.tokenizer = Tokenizer.from_model(write_tiny_model(folder, *tags))
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

    def accepts(self, grammar: str, text: str) -> bool:
        return allows(self.tokenizer, grammar, text)

    def samples(self, grammar: str, rng: random.Random, num: int = 1) -> Iterator[str]:
        for _ in range(num):
            yield sample(self.tokenizer, compiler_of(self.tokenizer).compile(grammar), rng, self.ends)

    def parse(self, text: str, schemas: dict[str, Any] = ALL, *, parallel: bool = True) -> Answer:
        parser = AnswerParser(self.new_format(schemas, parallel), hidden=(*self.content_markers, *self.special_ids))
        answer = read_answer(parser, [text])
        answer.is_complete = parser.ends_with_calls
        return answer


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@kinds_first(DISTINCT)
def test_the_parser_reads_what_the_grammar_allows(name: str, special: bool, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path, special=special)
    for choice, parallel in [("required", True), ("required", False), (NAMED, True)]:
        grammar = model.grammar(tools_of(ALL), choice, parallel=parallel)
        for text in model.samples(grammar, rng, num_examples(1, 20)):
            answer = model.parse(text, parallel=parallel)
            assert (answer.content, answer.is_complete) == ("", True), text
            for tool, arguments in answer.decoded:
                jsonschema.validate(arguments, ALL[tool])
            assert len(answer.calls) == 1 or (parallel and choice == "required"), text


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@kinds_first(DISTINCT)
def test_strict_calls_are_optional(name: str, special: bool, tmp_path: Path, rng: random.Random) -> None:
    """Free text is allowed, and calls in it follow their schemas, however they begin."""
    model = Model(name, tmp_path, special=special)
    (call,) = model.samples(model.grammar(tools_of(ALL), NAMED), rng)
    grammar = model.grammar(tools_of(ALL, strict=ALL), None)
    assert all(model.accepts(grammar, text) for text in ("", "Hello, world!\n", "a < b", call))
    assert not model.accepts(grammar, call.replace("get_weather", "get_whatever"))
    for text in model.samples(grammar, rng, num_examples(2, 20)):
        for tool, arguments in model.parse(text).decoded:
            jsonschema.validate(arguments, ALL[tool])


def test_content_after_a_marker_that_begins_as_calls_do(tmp_path: Path, rng: random.Random) -> None:
    """Muse addresses content `to=user` and calls `to=get_weather`."""
    model = Model("muse-glimmer", tmp_path)
    (call,) = model.samples(model.grammar(tools_of(ALL), NAMED), rng)
    call = call.removeprefix("to=user<|message|>")
    grammar = model.grammar(tools_of(ALL, strict=ALL), None)
    for text in ("", "Hi", call, f"Hi {call}"):
        assert model.accepts(grammar, text)
        assert model.accepts(grammar, f"to=user<|message|>{text}")
    assert not model.accepts(grammar, "to=else<|message|>Hi")


@kinds_first(DISTINCT)
def test_arguments_of_tools_that_are_not_strict_are_free(name: str, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    tools = tools_of(ALL, strict=["time-now"])
    if model.tool_format.name != "minimax_m3":  # which does not support further properties
        for text in model.samples(model.grammar(tools, None), rng, num_examples(2, 20)):
            assert all(isinstance(arguments, dict) for _, arguments in model.parse(text).decoded), text


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
@pytest.mark.parametrize("schema", [MORE, EITHER, WHOLE_TREE, CIRCLE], ids=["more", "either", "whole", "circle"])
def test_other_schemas(name: str, schema: dict[str, Any], tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    if name == "MiniMax-M3" and schema not in RECURSIVE:  # further properties are not supported
        return
    grammar = model.grammar(tools_of({"get_weather": schema}), "required", parallel=False)
    for text in model.samples(grammar, rng, num_examples(3, 30)):
        ((_, arguments),) = model.parse(text, {"get_weather": schema}).decoded
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
