"""Tool calls and reasoning, in answers that are composed of known parts and in arbitrary text, in any pieces."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.part_table import is_installed
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser, ReasoningParser, ReasoningTags
from server.text.parsers.markers import Markers
from server.text.parsers.tool_formats import GENERIC, ToolFormat
from server.text.parsers.tool_parser import ToolParser
from tests.support.growth import check_growth
from tests.support.parsing import Answer, cut, joined_parts, read_answer
from tests.support.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES

OF_PART = pytest.mark.skipif(not is_installed("tool_formats"), reason="names before arguments are of that part")
MISTRAL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
Call = tuple[str, str]  # name, arguments
NAMES: dict[str, Any] = {name: {} for name in ("f", "get_weather", "a-b_C9")}


def parse(format: ToolFormat, pieces: list[str], *, parallel: bool = True, hidden: tuple[str, ...] = ()) -> Answer:
    parser = ToolParser(format, NAMES, parallel=parallel, hidden=hidden)
    answer = read_answer(parser, pieces)
    answer.is_complete = parser.is_complete
    assert parser.num_calls == len(answer.calls)
    return answer


# Answers composed of known parts.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab"\\{}[]:,</tool_call>é\n', max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text('a"}{', max_size=2), inner, max_size=2),
    max_leaves=5,
)
OBJECTS = st.builds(
    lambda value, indent, ascii_only: json.dumps(value, indent=indent, ensure_ascii=ascii_only),
    st.dictionaries(st.text('ab"{', max_size=3), JSON, max_size=3),
    st.sampled_from([None, 2]),
    st.booleans(),
)
CUTS = st.lists(st.integers(0, 400), max_size=20)
SPACE = st.sampled_from(["", " ", "\n", " \n\t"])
CLOSED = ("plain", "typed", "more", "first", "string", "none", "null")
FORMS = (*CLOSED, "unclosed")


@st.composite
def calls(draw: st.DrawFn, *, key: str | None = None, forms: Sequence[str] = FORMS) -> tuple[str, Call]:
    """Draw the text of a call as a JSON object, and its name and arguments."""
    name, arguments, space = draw(st.sampled_from(sorted(NAMES))), draw(OBJECTS), draw(SPACE)
    key, form = key or draw(st.sampled_from(["arguments", "parameters"])), draw(st.sampled_from(forms))
    member, value = f'"name":{space}"{name}"', arguments
    if form in ("none", "null"):
        value, arguments = "null", "{}"
    if form == "string":
        value = json.dumps(arguments)
    texts = {
        "typed": f'{{"type": "function", {member}, "{key}": {value}{space}}}',
        "more": f'{{{member}, "{key}":{value}{space}, "id": "}}"}}',
        "first": f'{{"{key}":{space}{value}, {member}}}',
        "none": f"{{{space}{member}}}",
        "unclosed": f'{{{member},"{key}":{value}',
    }
    return texts.get(form, f'{{{space}{member}{space},{space}"{key}": {value}{space}}}'), (name, arguments)


# Text that looks like a call but is not one, up to the character that shows it.
BROKEN = st.sampled_from(
    [
        *('{"name": "unknown", "arguments": {}}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}'),
        *('{"name": 5, "arguments": {}}', '{"arguments": {}}', '{"arguments": {"a": 1}, "name": "unknown"}', "nothing"),
        *('{"name": "f" "arguments": {}}', '{"a": {"name": "f", "arguments": {}}}', "{}", '"f"'),
    ]
)
CONTENTS = st.text('ab {}[]:,"</tol_cl>é\n;', max_size=12).filter(lambda text: "<tool_call>" not in text)


@given(st.data(), CUTS)
def test_hermes(data: st.DataObject, cuts: list[int]) -> None:
    text, stretches, expected = "", [""], []
    for _ in range(data.draw(st.integers(0, 5))):
        kind = data.draw(st.sampled_from(["content", "call", "broken"]))
        if kind == "call":
            call, parts = data.draw(calls())
            text += f"<tool_call>{data.draw(SPACE)}{call}{data.draw(SPACE)}</tool_call>"
            expected.append(parts)
            stretches.append("")
            continue
        piece = data.draw(CONTENTS if kind == "content" else BROKEN.map("<tool_call>{}</tool_call>".format))
        text += piece
        stretches[-1] += piece
    # Only white space between calls is layout.
    content = stretches[0] if len(stretches) == 1 else "".join(text for text in stretches if text.strip())
    assert parse(HERMES, cut(text, cuts)) == parse(HERMES, list(text)) == Answer(content, expected)


@given(
    st.sampled_from([LLAMA3, GENERIC]),
    st.lists(calls(forms=CLOSED), min_size=1, max_size=3),
    st.booleans(),
    SPACE,
    CUTS,
)
def test_bare_calls(
    format: ToolFormat, found: list[tuple[str, Call]], is_tagged: bool, space: str, cuts: list[int]
) -> None:
    """Draw an answer that consists of calls only, one after the other or in an array."""
    separator = "; " if format is LLAMA3 else "\n"
    written = [call for call, _ in found]
    text = space + ("<|python_tag|>" if is_tagged and format is LLAMA3 else "") + separator.join(written)
    if is_tagged and format is GENERIC:
        text = f"{space}[{', '.join(written)}{space}]"
    assert parse(format, cut(text, cuts)) == parse(format, list(text)) == Answer("", [parts for _, parts in found])


@OF_PART
@given(
    st.lists(calls(key="arguments", forms=CLOSED), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), min_size=1, max_size=3),
    st.sampled_from(["", "[ARGS]", "[CALL_ID]123456789[ARGS]"]),
    st.sampled_from(["", "Let me see. "]),
    CUTS,
)
def test_mistral(array: list[tuple[str, Call]], named: list[Call], head: str, content: str, cuts: list[int]) -> None:
    text = f"{content}[TOOL_CALLS] [{', '.join(call for call, _ in array)}]"
    assert parse(MISTRAL, cut(text, cuts), hidden=MISTRAL_TOKENS) == Answer(content, [call for _, call in array])
    text = content + "".join(f"[TOOL_CALLS]{name}{head}{arguments}" for name, arguments in named)
    for format in (MISTRAL, MISTRAL_NAMES):
        whole = parse(format, list(text))
        assert parse(format, cut(text, cuts), hidden=MISTRAL_TOKENS) == whole == Answer(content, named)


# Arbitrary text.

SOUP_PIECES = (
    '<tool_call>~</tool_call>~[TOOL_CALLS]~<|python_tag|>~<tool~[~]~{~}~"~,~:~;~ ~\n~\\~f~é~[ARGS]~"name"~"f"'
    '~"arguments"~{"name": "f", "arguments": {~"name": "f"~"arguments": {}~{"name": "get_weather", "parameters": {}}'
)
SOUP = st.lists(st.sampled_from(SOUP_PIECES.split("~")), max_size=15).map("".join)


@given(st.sampled_from([HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES, GENERIC]), SOUP, CUTS, st.booleans())
def test_any_text_reads_the_same_in_any_pieces(format: ToolFormat, text: str, cuts: list[int], parallel: bool) -> None:
    whole = parse(format, [text], parallel=parallel)
    assert parse(format, cut(text, cuts), parallel=parallel) == whole
    assert parse(format, list(text), parallel=parallel) == whole
    characters = iter(text)
    assert all(character in characters for character in whole.content)
    assert whole.calls or whole.content == text
    assert all(arguments in text or arguments == "{}" for _, arguments in whole.calls)
    assert parallel or len(whole.calls) <= 1


# Single cases.


def test_arguments_are_streamed_as_they_come() -> None:
    begin, arguments, end = '<tool_call>\n{"name": "f", "arguments": ', '{"a": [1, 2]}', "}\n</tool_call>"
    streamed = [["f", "{"], *([char] for char in arguments[1:]), *([] for _ in end)]
    assert stream(HERMES, [begin, *arguments, *end]) == [[], *streamed]


def stream(format: ToolFormat, pieces: Sequence[str]) -> list[list[str]]:
    """Return the texts of the parts that each piece releases. Nothing is left at the end."""
    parser = ToolParser(format, NAMES)
    streamed = [[part.text for part in parser.push(piece)] for piece in pieces]
    assert parser.finish() == []
    return streamed


def test_content_is_held_only_where_a_call_may_begin() -> None:
    assert stream(HERMES, ("Hi <", "b> <tool", "_call", "er>")) == [["Hi "], ["<b> "], [], ["<tool_caller>"]]
    # An answer in JSON is streamed once its first key is known.
    pieces, streamed = (" {", '"answ', 'er"', ': "', "4"), [[], [], [' {"answer"'], [': "'], ["4"]]
    assert stream(GENERIC, pieces) == streamed


@pytest.mark.parametrize("format", [HERMES, LLAMA3, MISTRAL, GENERIC])
def test_json_answers_are_content(format: ToolFormat) -> None:
    for text in ('{"name": "Bob", "age": 5}', '[1, 2, {"name": "f"}]', '{"name": "f", "arguments": 5}', "[]", "{", "["):
        assert parse(format, list(text)) == Answer(text)


@OF_PART
@pytest.mark.checklist("C24")
@pytest.mark.parametrize("num_spaces", [0, 200, 251, 252, 253, 300, 600])
def test_what_is_too_long_is_content_in_any_pieces(num_spaces: int) -> None:
    space = " " * num_spaces
    for text in (
        f"[TOOL_CALLS]f{space}{{}}",
        f"[TOOL_CALLS]f{space}x{{}}",
        f'[TOOL_CALLS]{{{space}"name": "f"}}',
        f'[TOOL_CALLS]{{{space}"a": "[TOOL_CALLS]{{"}}',
        f"[TOOL_CALLS]{{{space}}}",
    ):
        answer = parse(MISTRAL, [text])
        assert parse(MISTRAL, list(text)) == answer
        assert answer.calls == [("f", "{}")] or answer.content == text


def test_without_parallel_calls_the_second_is_content() -> None:
    value = '{"name": "f", "arguments": {}}'
    call, array = f"<tool_call>{value}</tool_call>", f"[TOOL_CALLS][{value}, {value}]"
    assert parse(HERMES, list(call + "\n" + call), parallel=False) == Answer("\n" + call, [("f", "{}")])
    answer = parse(MISTRAL, list(array), parallel=False, hidden=("[TOOL_CALLS]",))
    assert answer == Answer(f", {value}]", [("f", "{}")])


def test_hidden_markers_are_no_content() -> None:
    for text, content in [
        ("[TOOL_CALLS]nothing", "nothing"),
        ("a[TOOL_CALLS]f[ARGS]", "af"),
        ("[ARGS]a[TOOL_CALLS]b[", "ab["),
        ('[TOOL_CALLS][{"name": "x", "arguments": {}}]', '[{"name": "x", "arguments": {}}]'),
    ]:
        assert parse(MISTRAL, list(text), hidden=MISTRAL_TOKENS).content == content
        assert parse(MISTRAL, list(text)).content == text


REPEATED = [
    *((GENERIC, "", unit) for unit in (" \n", "[", '{"arguments":{"a":', '<tool_call>{"', " <tool_call>[", '{"\\')),
    (GENERIC, '<tool_call>{"name": "f", "arguments": {', '{"arguments":{"a":'),
    (GENERIC, '<tool_call>{"arguments": {"', '<tool_call>{"'),
    (AnswerFormat(reasoning_tags=ReasoningTags("<think>", "</think>"), is_reasoning=True), "a", "\n"),
]


@pytest.mark.long
@pytest.mark.checklist("C24")
@pytest.mark.parametrize(("format", "opening", "unit"), REPEATED)
def test_time_is_linear(format: ToolFormat | AnswerFormat, opening: str, unit: str) -> None:
    """Also if the text is nested or held back to the end."""
    whole = format if isinstance(format, AnswerFormat) else AnswerFormat(format, NAMES)

    def prepare(size: int) -> Callable[[], object]:
        text = opening + unit * (size // len(unit))

        def work() -> None:
            parser = AnswerParser(whole)
            for begin in range(0, len(text), 4):
                parser.push(text[begin : begin + 4])
                assert parser.num_held >= 0  # as the server asks after each token
            parser.finish()

        return work

    check_growth(prepare, 1 << 14)


# Reasoning, content and calls of an answer are told apart.

TAGS = ReasoningTags("<think>", "</think>")


def split_reasoning(pieces: list[str], *, is_open: bool = False) -> tuple[str, str]:
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
    assert split_reasoning(cut(text, cuts), is_open=is_open) == expected == split_reasoning(list(text), is_open=is_open)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", "<", " "]), max_size=10).map("".join), st.booleans())
def test_any_text_with_tags_reads_the_same_in_any_pieces(text: str, is_open: bool) -> None:
    assert split_reasoning(list(text), is_open=is_open) == split_reasoning([text], is_open=is_open)


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
    assert split_reasoning([text], is_open=is_open) == expected == split_reasoning(list(text), is_open=is_open)


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


# Markers, against a search of the whole text.


MARKERS = st.lists(st.text("<a>", min_size=1, max_size=3), max_size=3)


@given(MARKERS, st.text("<a>b", max_size=10))
def test_finds_the_first_and_the_longest_there(markers: list[str], text: str) -> None:
    found = [(text.index(marker), -len(marker), marker) for marker in markers if marker in text]
    match = Markers(markers).find(text)
    assert (match and (match.start(), match[0])) == ((min(found)[0], min(found)[2]) if found else None)


@given(MARKERS, st.text("<a>b", max_size=6))
def test_the_end_of_a_text_may_begin_one(markers: list[str], text: str) -> None:
    begun = [
        n for n in range(len(text) + 1) if any(len(m) > n and m.startswith(text[len(text) - n :]) for m in markers)
    ]
    assert Markers(markers).num_partial(text) == max(begun, default=0)
