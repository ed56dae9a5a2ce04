"""Grammars of tool calls: llguidance compiles them, and the parser reads what they allow."""

import json
from collections.abc import Collection
from typing import Any

import pytest
from pydantic import TypeAdapter

from server.constrained.constraints import COMPACT
from server.constrained.tool_grammar import tool_grammar
from server.part_table import is_installed, load_module
from server.schemas.tools import Tool, ToolChoice
from server.text.parsers.answer_parser import AnswerFormat, ReasoningTags
from server.text.parsers.tool_formats import GENERIC, ToolFormat
from server.text.tokenizer import Tokenizer
from tests.support.grammars import allows
from tests.support.harmony import MARKERS
from tests.support.parsing import read_answer
from tests.support.tiny_tokenizer_model import write_tiny_model
from tests.support.tool_model import TAGS
from tests.support.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES

HARMONY: ToolFormat | None = None
if is_installed("tool_formats"):
    HARMONY = load_module("tool_formats", "harmony").HARMONY_FORMAT
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


def new_format(format: ToolFormat, **fields: Any) -> AnswerFormat:
    if format is HARMONY:
        harmony: AnswerFormat = load_module("tool_formats", "harmony").HarmonyFormat(**fields)
        return harmony
    return AnswerFormat(format, **fields)


def grammar_of(
    model: Tokenizer, format: ToolFormat, choice: Any = None, strict: bool = False, more: bool = False, **fields: Any
) -> str:
    answers = new_format(format, **fields)
    special_ids = model.special_ids_in([*answers.markers, *format.texts, THINK.start, THINK.end])
    options: dict[str, Any] = {"special_ids": special_ids, "has_content_grammar": more}
    tools, choice = tools_of(TOOLS, ["weather"] if strict else []), validated(choice)
    grammar = tool_grammar(answers, tools, choice, **options)
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


JSON = (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES, GENERIC)
FORMATS = pytest.mark.parametrize("format", [*JSON, *([HARMONY] if HARMONY else [])], ids=lambda f: f.name)
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
    parser = new_format(format, tools=tools, parallel_calls=parallel).new_parser()
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


def test_json_cannot_break_the_grammar(model: Tokenizer) -> None:
    """Text in a schema cannot break out of its JSON string."""
    schema = {"type": "object", "properties": {'a"\n/\\': {"enum": ['x"\nstart: y', "é", "</tool_call>"]}}}
    grammar = tool_grammar(AnswerFormat(HERMES), tools_of({"f": schema}), "required")
    assert grammar is not None
    for value in ('x"\nstart: y', "é"):
        arguments = json.dumps({'a"\n/\\': value}, ensure_ascii=False)
        if not model.special_ids_in(["<tool_call>"]):
            assert allows(model, grammar, write(HERMES, ("f", arguments)))
