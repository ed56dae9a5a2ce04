"""Thoughts, content and calls of one answer, and the formats that chat templates show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.output_parser import OutputFormat, OutputParser
from server.text.parts import PartKind
from server.text.reasoning import ThinkTags
from server.text.tool_formats import GENERIC, HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES, ToolFormat, detect_tool_format
from tests.server.text.test_tool_parser import cut

TAGS = ThinkTags("<think>", "</think>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def parse(format: OutputFormat, pieces: list[str], hidden: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """The parts, with adjacent ones of a kind as one."""
    parser = OutputParser(format, hidden=hidden)
    found: list[tuple[str, str]] = []
    for kind, text in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        if found and found[-1][0] == kind and kind is not PartKind.CALL:
            found[-1] = (found[-1][0], found[-1][1] + text)
        else:
            found.append((kind.value, text))
    return found


@given(st.lists(st.integers(0, 200), max_size=12))
def test_all_parts_in_one_pass(cuts: list[int]) -> None:
    format = OutputFormat(HERMES, frozenset({"f"}), think_tags=TAGS)
    text = f"<think>\nI could call {CALL}\n</think>\n\nOne moment.\n{CALL}\n{CALL}\nDone?"
    call = [("call", "f"), ("arguments", '{"a": 1}')]
    assert parse(format, cut(text, cuts)) == [
        ("reasoning", f"I could call {CALL}"),
        ("content", "One moment.\n"),
        *call,
        *call,
        ("content", "\nDone?"),
    ]


def test_thoughts_that_the_prompt_has_begun() -> None:
    format = OutputFormat(HERMES, frozenset({"f"}), think_tags=TAGS, is_thinking=True)
    assert parse(format, [f"Hm</think>{CALL}"]) == [("reasoning", "Hm"), ("call", "f"), ("arguments", '{"a": 1}')]
    parser = OutputParser(format)
    assert parser.is_thinking
    parser.push("Hm</think>")
    assert not parser.is_thinking


def test_what_is_not_expected_is_content() -> None:
    text = f"<think>a</think>{CALL}"
    assert parse(OutputFormat(HERMES), [text]) == [("content", text)]
    assert parse(OutputFormat(HERMES, think_tags=TAGS), [text]) == [("reasoning", "a"), ("content", CALL)]


def test_control_tokens_are_no_content() -> None:
    format = OutputFormat(HERMES, think_tags=TAGS)
    text = "<think>a</think>b</think>c<think>"
    assert parse(format, [text], hidden=format.markers) == [("reasoning", "a"), ("content", "bc")]


def test_markers_are_those_that_matter() -> None:
    assert OutputFormat().is_plain
    assert OutputFormat(think_tags=TAGS).markers == ("<think>", "</think>")
    format = OutputFormat(MISTRAL, frozenset({"f"}))
    assert format.markers == ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    assert not format.is_plain


@pytest.mark.parametrize(("text", "ends"), [(CALL, True), (CALL[:-20], False), ("a", False), (CALL[:-12], True)])
def test_whether_an_answer_ends_with_calls(text: str, ends: bool) -> None:
    parser = OutputParser(OutputFormat(HERMES, frozenset({"f"})))
    parser.push(text)
    parser.finish()
    assert parser.ends_with_calls == ends


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ('{{ \'<tool_call>\\n{"name": "\' + call.name }}', HERMES),
        ("{{ '[TOOL_CALLS] [' }}{{ '<tool_call>' }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' + call.name + '[ARGS]' }}", MISTRAL_NAMES),
        ("{% if call.name in builtin_tools %}{{ '<|python_tag|>' }}{% endif %}", LLAMA3),
        ("""{{ 'Respond in the format {"name": function name, "parameters": dictionary of argument name' }}""", LLAMA3),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", GENERIC),
    ],
)
def test_formats_of_templates(source: str, format: ToolFormat) -> None:
    assert detect_tool_format(source) is format
