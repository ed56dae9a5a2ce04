"""Grammars of tool calls: llguidance compiles them, and the parser reads all text that they allow as calls."""

import json
import random
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter

from server.constrained.constraints import COMPACT
from server.constrained.tool_grammar import tool_grammar
from server.schemas.tools import Tool, ToolChoice
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.answer_parts import PartKind
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES, ToolFormat
from tests.support.grammars import GrammarModel, calls_of
from tests.support.tool_model import write_tool_model

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


def grammar_of(
    model: GrammarModel,
    format: ToolFormat,
    choice: Any = None,
    *,
    parallel: bool = True,
    strict: bool = False,
    has_content_grammar: bool = False,
    **more: Any,
) -> str:
    validated: ToolChoice | None = None if choice is None else TypeAdapter(ToolChoice).validate_python(choice)
    special_ids = model.tokenizer.special_ids_in([*format.texts, THINK.start, THINK.end])
    grammar = tool_grammar(
        AnswerFormat(format, parallel_calls=parallel, **more),
        make_tools(strict=strict),
        validated,
        special_ids=special_ids,
        has_content_grammar=has_content_grammar,
    )
    assert grammar is not None
    return grammar


def write(format: ToolFormat, *calls: tuple[str, str]) -> str:
    """Return calls as models write them."""
    if format.name == "mistral_names":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    key = "parameters" if format is LLAMA3 else "arguments"
    objects = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
    return {
        "hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects),
        "llama3": "; ".join(objects),
        "mistral": f"[TOOL_CALLS][{', '.join(objects)}]",
        "generic": objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]",
    }[format.name]


FORMATS = pytest.mark.parametrize("format", [HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES, GENERIC], ids=lambda f: f.name)
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}


@FORMATS
def test_forced_calls(model: GrammarModel, format: ToolFormat) -> None:
    one, other = ("weather", PARIS), ("time", "{}")
    wrong = ["", "Hello", write(format, ("weather", "{}")), write(format, ("zzz", "{}")), write(format, one) + "x"]
    wrong += [write(format, ("weather", '{"city": "paris", "x": 1}')), write(format, ("time", '{"a": 1}'))]
    for choice, parallel, allowed, refused in [
        ("required", True, [[one], [other], [one, other, one]], []),
        ("required", False, [[one], [other]], [[one, other]]),
        (WEATHER, True, [[one], [("weather", BERN)]], [[other], [one, one]]),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
            True,
            [[one], [one, one]],
            [[other]],
        ),
    ]:
        grammar = grammar_of(model, format, choice, parallel=parallel)
        assert all(model.accepts(grammar, write(format, *calls)) for calls in allowed), (choice, allowed)
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
    assert not model.accepts(grammar_of(model, format, strict=True, parallel=False), two)


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
    properties = {"name": {"type": "string"}, "answer": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["answer"], "additionalProperties": False}
    schema["x-guidance"] = COMPACT

    def grammar(choice: str, **more: Any) -> str:
        calls = grammar_of(model, format, choice, has_content_grammar=True, **more)
        parts = [{"name": "answer", "lark_grammar": calls}, {"name": "content", "json_schema": schema}]
        return json.dumps({"grammars": parts})

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
    assert tool_grammar(AnswerFormat(HERMES), make_tools(), None) is None
    assert tool_grammar(AnswerFormat(HERMES, parallel_calls=False), make_tools(), "auto") is None
    assert tool_grammar(AnswerFormat(HERMES), make_tools(strict=True), "none") is None
    assert tool_grammar(AnswerFormat(HERMES), None, None) is None


@FORMATS
def test_the_parser_reads_what_the_grammar_allows(model: GrammarModel, format: ToolFormat, rng: random.Random) -> None:
    """Outputs are sampled at random from the tokens that the grammar's masks allow."""
    for choice, parallel in [("required", True), ("required", False), (WEATHER, True)]:
        text = model.sample(model.matcher(grammar_of(model, format, choice, parallel=parallel)), rng)
        parser = AnswerParser(AnswerFormat(format, {name: {} for name in SCHEMAS}, parallel_calls=parallel))
        parts = parser.push(text) + parser.finish()
        assert not any(part.kind is PartKind.CONTENT for part in parts), text
        assert parser.ends_with_calls
        calls = calls_of(parts)
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])
        assert len(calls) == 1 or (parallel and choice is not WEATHER)


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
