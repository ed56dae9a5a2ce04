"""Grammars of answers in the harmony format: llguidance compiles them, and the parser reads what they allow."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import TypeAdapter

from server.constrained.constraints import COMPACT
from server.constrained.harmony_grammar import harmony_grammar
from server.schemas.tools import ToolChoice
from server.text.parsers.answer_parts import PartKind
from server.text.parsers.harmony import MARKERS, HarmonyFormat
from tests.server.constrained.test_tool_grammar import BERN, PARIS, SCHEMAS, WEATHER, make_tools
from tests.support.grammars import GrammarModel, calls_of
from tests.support.harmony import write_harmony_model
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID

NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm <b>.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me\nsee.<|end|>{NEXT}"
FINAL = "<|channel|>final<|message|>"
NAMED: dict[str, Any] = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GrammarModel:
    folder = tmp_path_factory.mktemp("harmony")
    return GrammarModel(write_harmony_model(folder, special_markers=request.param == "special"))


def grammar_of(
    model: GrammarModel,
    choice: Any = None,
    *,
    strict: bool = False,
    has_content_grammar: bool = False,
    is_final: bool = False,
) -> str:
    validated: ToolChoice | None = None if choice is None else TypeAdapter(ToolChoice).validate_python(choice)
    grammar = harmony_grammar(
        HarmonyFormat(is_final=is_final),
        make_tools(strict=strict),
        validated,
        special_ids=model.tokenizer.special_ids_in(MARKERS),
        has_content_grammar=has_content_grammar,
    )
    assert grammar is not None
    return grammar


def call(name: str, arguments: str, *, content_type: str = " <|constrain|>json", is_role_first: bool = False) -> str:
    recipient, channel = f" to=functions.{name}", "<|channel|>commentary"
    header = recipient + channel if is_role_first else channel + recipient
    return f"{header}{content_type}<|message|>{arguments}"


def test_forced_calls(model: GrammarModel) -> None:
    wrong = ["", "Hi", f"{FINAL}Hi", ANALYSIS, call("weather", "{}"), call("zzz", "{}"), call("time", "{}") + "x"]
    wrong += [call("weather", PARIS) + f"<|call|>{NEXT}" + call("time", "{}"), call("time", '{"a": 1}')]
    for choice, allowed, refused in [
        ("required", [call("weather", PARIS), call("time", "{}")], []),
        (WEATHER, [call("weather", BERN)], [call("time", "{}")]),
        (NAMED, [call("weather", BERN)], [call("time", "{}")]),
    ]:
        grammar = grammar_of(model, choice)
        for before in ("", ANALYSIS, PREAMBLE, ANALYSIS + PREAMBLE + ANALYSIS):
            assert all(model.accepts(grammar, before + text) for text in allowed), choice
            assert not any(model.accepts(grammar, before + text) for text in [*wrong, *refused]), choice
    grammar = grammar_of(model, "required")
    for content_type in (" <|constrain|>json", "<|constrain|>json", " json", ""):
        for is_role_first in (False, True):
            text = call("time", "{}", content_type=content_type, is_role_first=is_role_first)
            assert model.accepts(grammar, text), text
            spaced = re.sub(r"(<\|(start|channel|message|constrain)\|>)", r"\1 ", ANALYSIS + text)
            assert model.accepts(grammar, spaced), spaced


def test_strict_calls_of_an_answer_that_is_free(model: GrammarModel) -> None:
    grammar = grammar_of(model, strict=True)
    for before in ("", ANALYSIS, PREAMBLE):
        for text in (FINAL, f"{FINAL}Hello,\nworld!", call("weather", PARIS), call("time", '{"a": 1}')):
            assert model.accepts(grammar, before + text), text
        assert not model.accepts(grammar, before + call("weather", "{}"))


def test_content_has_a_grammar_of_its_own(model: GrammarModel) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    schema |= {"additionalProperties": False, "x-guidance": COMPACT}

    def grammar(choice: str, **more: bool) -> str:
        lark = grammar_of(model, choice, has_content_grammar=True, **more)
        return json.dumps(
            {"grammars": [{"name": "answer", "lark_grammar": lark}, {"name": "content", "json_schema": schema}]}
        )

    free, forced, alone = grammar("auto"), grammar("required"), grammar("none")
    answer, time = '{"answer":42}', call("time", '{"a": 1}')
    typed = f"<|channel|>final <|constrain|>json<|message|>{answer}"
    for before in ("", ANALYSIS, ANALYSIS + ANALYSIS):
        assert all(model.accepts(free, before + text) for text in (FINAL + answer, typed, time))
        assert not any(model.accepts(free, before + text) for text in (answer, f"{FINAL}Hi", f"{FINAL}{answer}x"))
        assert model.accepts(alone, before + FINAL + answer)
        assert not model.accepts(alone, before + time)
        assert model.accepts(forced, before + call("time", "{}"))
        assert not model.accepts(forced, before + FINAL + answer)
    assert not model.accepts(free, PREAMBLE + FINAL + answer)  # it would be content
    assert model.accepts(grammar("none", is_final=True), answer)


def test_answers_that_the_prompt_begins(model: GrammarModel) -> None:
    forced, strict = grammar_of(model, "required", is_final=True), grammar_of(model, strict=True, is_final=True)
    text = f"lo.<|end|>{NEXT}" + call("time", "{}")
    assert model.accepts(forced, text)
    assert not model.accepts(forced, "lo.")
    assert model.accepts(strict, text)
    assert model.accepts(strict, "lo.")


def test_a_call_ends_with_a_token_that_ends_the_answer(model: GrammarModel) -> None:
    ends = list(model.tokenizer.special_ids_in(["<|call|>", "<|return|>"]).values())
    guide = LLTokenizer(model.tokenizer.to_json(), eos_token=ends or [END_OF_TEXT_ID])
    matcher = LLMatcher(guide, grammar_of(model, "required"), log_level=0)
    matcher.consume_tokens(model.tokenizer.encode(call("time", "{}"), add_special_tokens=False))
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    allowed = [token_id for token_id in range(model.tokenizer.vocab_size) if mask >> token_id & 1]
    assert allowed == (sorted(ends) or [END_OF_TEXT_ID])


def test_what_needs_no_grammar() -> None:
    assert harmony_grammar(HarmonyFormat(), make_tools(), None) is None
    assert harmony_grammar(HarmonyFormat(), make_tools(strict=True), "none") is None
    assert harmony_grammar(HarmonyFormat(), None, None) is None


def test_the_parser_reads_what_the_grammar_allows(model: GrammarModel, rng: random.Random) -> None:
    """After a header, outputs are sampled at random from the tokens that the grammar's masks allow."""
    for choice, tool in (("required", "weather"), ("required", "time"), (WEATHER, "weather")):
        matcher = model.matcher(grammar_of(model, choice))
        before = rng.choice(["", ANALYSIS, PREAMBLE]) + call(tool, "")
        matcher.consume_tokens(model.tokenizer.encode(before, add_special_tokens=False))
        text = before + model.sample(matcher, rng)
        parser = HarmonyFormat(tools={name: {} for name in SCHEMAS}).new_parser()
        parts = parser.push(text) + parser.finish()
        assert parser.ends_with_calls, text
        ((name, arguments),) = calls_of(parts)
        jsonschema.validate(arguments, SCHEMAS[name])
        assert parts[-1].kind is PartKind.ARGUMENTS
