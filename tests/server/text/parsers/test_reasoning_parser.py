"""Reasoning, content and calls of an answer are told apart, however the text was split into pieces."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.reasoning_parser import ReasoningParser, ReasoningTags
from server.text.parsers.tool_formats import HERMES
from tests.support.growth import check_growth
from tests.support.parsing import cut, joined_parts

TAGS = ReasoningTags("<think>", "</think>")


def parse(pieces: list[str], *, is_open: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(TAGS, is_open=is_open)
    found = [parser.push(piece) for piece in pieces] + [parser.finish()]
    return "".join(reasoning for reasoning, _ in found), "".join(content for _, content in found)


TEXTS = st.text("ab \n</think>é", max_size=20).filter(lambda text: "think>" not in text)
LINE_BREAKS = st.sampled_from(["", "\n", "\n\n"])
MANY_BREAKS = "\n" * 100  # of which the last 64 may be layout


@given(TEXTS, TEXTS, LINE_BREAKS, st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_reasoning_and_content(reasoning: str, content: str, layout: str, is_open: bool, cuts: list[int]) -> None:
    text = f"{'' if is_open else ' <think>'}{layout}{reasoning}{layout}</think>{layout}{content}"
    expected = (reasoning.strip("\n"), content.lstrip("\n"))
    assert parse(cut(text, cuts), is_open=is_open) == expected == parse(list(text), is_open=is_open)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", "<", " "]), max_size=10).map("".join), st.booleans())
def test_any_text_reads_the_same_in_any_pieces(text: str, is_open: bool) -> None:
    assert parse(list(text), is_open=is_open) == parse([text], is_open=is_open)


CASES = [
    ("<think>a", False, ("a", "")),
    ("<think>a\n\n</thi", False, ("a\n\n</thi", "")),
    ("a</think>b", True, ("a", "b")),
    ("a</think>b", False, ("", "a</think>b")),
    ("b<think>a</think>", False, ("", "b<think>a</think>")),
    ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
    ("<thin", False, ("", "<thin")),
    ("<think>\n\n</think>\n\nb", False, ("", "b")),
    ("\n", False, ("", "\n")),
    (f"<think>{MANY_BREAKS}a{MANY_BREAKS}</think>{MANY_BREAKS}b", False, ("a" + "\n" * 36, "b")),
    (" " * 100 + "<think>a</think>", False, ("", " " * 100 + "<think>a</think>")),
]


@pytest.mark.parametrize(("text", "is_open", "expected"), CASES)
def test_single_cases(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert parse([text], is_open=is_open) == expected == parse(list(text), is_open=is_open)


def test_reasoning_is_streamed() -> None:
    parser = ReasoningParser(TAGS)
    pieces = ["<th", "ink>\n", "Hm", "m.\n", "So", "\n", "</", "think>", "\n\n", "Yes", "\n"]
    released = [parser.push(piece) for piece in pieces]
    assert released == [
        *[("", ""), ("", ""), ("Hm", ""), ("m.", ""), ("\nSo", ""), ("", ""), ("", ""), ("", ""), ("", "")],
        *[("", "Yes"), ("", "\n")],
    ]


def test_where_a_prompt_breaks_off() -> None:
    assert TAGS.are_opened_by("<|im_start|>assistant\n<think>\n")
    assert not TAGS.are_opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert TAGS.are_open_in("<think>\nLet me")
    assert not TAGS.are_open_in("<think>\nLet me</think> Yes")
    assert not TAGS.are_open_in("Yes")


@pytest.mark.long
def test_a_model_that_writes_line_breaks_without_end_takes_linear_time() -> None:
    def prepare(size: int) -> Callable[[], object]:
        return lambda: parse(["a", *"\n" * size], is_open=True)

    check_growth(prepare, 10_000)


# With calls.

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
PARTS = [("call", "f"), ("arguments", '{"a": 1}')]
BOTH = AnswerFormat(HERMES, {"f": {}}, reasoning_tags=TAGS)


@given(st.lists(st.integers(0, 200), max_size=12))
def test_all_parts_in_one_pass(cuts: list[int]) -> None:
    text = f"<think>\nI could call {CALL}\n</think>\n\nOne moment.\n{CALL}\n{CALL}\nDone?"
    expected = [("reasoning", f"I could call {CALL}"), ("content", "One moment.\n"), *PARTS, *PARTS]
    assert joined_parts(AnswerParser(BOTH), cut(text, cuts)) == [*expected, ("content", "\nDone?")]


ANSWERS = [
    (AnswerFormat(HERMES), "<think>a", [("content", "<think>a")]),  # what is not expected
    (AnswerFormat(HERMES, reasoning_tags=TAGS), f"<think>a</think>{CALL}", [("reasoning", "a"), ("content", CALL)]),
    (BOTH, f"<think>a</think>b</think>c{CALL}<think>", [("reasoning", "a"), ("content", "bc"), *PARTS]),
]


@pytest.mark.parametrize(("format", "text", "expected"), ANSWERS)
def test_control_tokens_are_no_content(format: AnswerFormat, text: str, expected: list[tuple[str, str]]) -> None:
    hidden = (TAGS.start, TAGS.end) if format.tools else ()
    assert joined_parts(AnswerParser(format, hidden=hidden), [text]) == expected
    assert format.is_plain == (expected == [("content", text)])


def test_where_parts_end() -> None:
    """Reasoning that the prompt opens ends with its tag, and an answer with calls where the last one is complete."""
    format = AnswerFormat(HERMES, {"f": {}}, reasoning_tags=TAGS, is_reasoning=True)
    for text, ends in ((CALL, True), (CALL[:-20], False), ("a", False), (CALL[:-12], True)):
        parser = AnswerParser(format)
        assert parser.is_reasoning
        assert joined_parts(parser, [f"Hm</think>{text}"])[0] == ("reasoning", "Hm")
        assert (parser.is_reasoning, parser.ends_with_calls) == (False, ends), text
