"""Reasoning, content and calls of one answer."""

from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.answer_parts import PartKind
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import (
    HERMES,
    MISTRAL,
)
from tests.server.text.parsers.test_tool_parser import cut

TAGS = ReasoningTags("<think>", "</think>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def parse(format: AnswerFormat, pieces: list[str], hidden: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return the parts, with adjacent parts of the same kind joined."""
    parser = AnswerParser(format, hidden=hidden)
    found: list[tuple[str, str]] = []
    for kind, text in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        if found and found[-1][0] == kind and kind is not PartKind.CALL:
            found[-1] = (found[-1][0], found[-1][1] + text)
        else:
            found.append((kind.value, text))
    return found


@given(st.lists(st.integers(0, 200), max_size=12))
def test_all_parts_in_one_pass(cuts: list[int]) -> None:
    format = AnswerFormat(HERMES, {"f": {}}, reasoning_tags=TAGS)
    text = f"<think>\nI could call {CALL}\n</think>\n\nOne moment.\n{CALL}\n{CALL}\nDone?"
    call = [("call", "f"), ("arguments", '{"a": 1}')]
    assert parse(format, cut(text, cuts)) == [
        ("reasoning", f"I could call {CALL}"),
        ("content", "One moment.\n"),
        *call,
        *call,
        ("content", "\nDone?"),
    ]


def test_reasoning_that_the_prompt_opens() -> None:
    format = AnswerFormat(HERMES, {"f": {}}, reasoning_tags=TAGS, is_reasoning=True)
    assert parse(format, [f"Hm</think>{CALL}"]) == [("reasoning", "Hm"), ("call", "f"), ("arguments", '{"a": 1}')]
    parser = AnswerParser(format)
    assert parser.is_reasoning
    parser.push("Hm</think>")
    assert not parser.is_reasoning


def test_what_is_not_expected_is_content() -> None:
    text = f"<think>a</think>{CALL}"
    assert parse(AnswerFormat(HERMES), [text]) == [("content", text)]
    assert parse(AnswerFormat(HERMES, reasoning_tags=TAGS), [text]) == [("reasoning", "a"), ("content", CALL)]


def test_control_tokens_are_no_content() -> None:
    format = AnswerFormat(HERMES, reasoning_tags=TAGS)
    text = "<think>a</think>b</think>c<think>"
    assert parse(format, [text], hidden=format.markers) == [("reasoning", "a"), ("content", "bc")]


def test_markers_are_those_that_matter() -> None:
    assert AnswerFormat().is_plain
    assert AnswerFormat(reasoning_tags=TAGS).markers == ("<think>", "</think>")
    format = AnswerFormat(MISTRAL, {"f": {}})
    assert {"[TOOL_CALLS][", "[ARGS]"} <= set(format.markers)
    assert not format.is_plain


def test_whether_an_answer_ends_with_calls() -> None:
    for text, ends in ((CALL, True), (CALL[:-20], False), ("a", False), (CALL[:-12], True)):
        parser = AnswerParser(AnswerFormat(HERMES, {"f": {}}))
        parser.push(text)
        parser.finish()
        assert parser.ends_with_calls == ends, text
