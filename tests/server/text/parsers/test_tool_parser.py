"""Tool calls, in answers that are composed of known parts and in arbitrary text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.answer_parts import PartKind
from server.text.parsers.argument_values import ArgumentSchema
from server.text.parsers.call_reader import ArgumentsReader
from server.text.parsers.tool_formats import (
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMES,
    PYTHONIC,
    TaggedArguments,
    ToolFormat,
)
from server.text.parsers.tool_parser import ToolParser
from tests.support.growth import check_growth

MISTRAL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
Call = tuple[str, str]  # name, arguments
NAMES = {name: ArgumentSchema({}) for name in ("f", "get_weather", "a-b_C9")}


@dataclass
class Answer:
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    is_complete: bool = True


def parse(format: ToolFormat, pieces: list[str], *, parallel: bool = True, hidden: tuple[str, ...] = ()) -> Answer:
    parser = ToolParser(format, NAMES, parallel=parallel, hidden=hidden)
    answer = Answer()
    for kind, text in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        assert text
        if kind is PartKind.CONTENT:
            answer.content += text
        elif kind is PartKind.CALL:
            answer.calls.append((text, ""))
        else:
            name, arguments = answer.calls.pop()
            answer.calls.append((name, arguments + text))
    answer.is_complete = parser.is_complete
    assert parser.num_calls == len(answer.calls)
    return answer


def cut(text: str, cuts: list[int]) -> list[str]:
    ends = [0, *sorted(min(end, len(text)) for end in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(ends)]


def push_all(reader: ArgumentsReader, pieces: list[str]) -> tuple[str, str, bool]:
    """Return the JSON, the text after the arguments, and whether they are complete."""
    found, rest, is_complete = "", "", False
    for piece in pieces:
        if is_complete:
            rest += piece
            continue
        json_text, is_complete = reader.push(piece)
        found += json_text
        rest = reader.unread
    return found, rest, is_complete


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
    key = key or draw(st.sampled_from(["arguments", "parameters"]))
    form = draw(st.sampled_from(forms))
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


def expected_content(stretches: list[str]) -> str:
    """Draw calls with text between them; only white space between calls is layout."""
    return stretches[0] if len(stretches) == 1 else "".join(text for text in stretches if text.strip())


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
    answer = parse(HERMES, cut(text, cuts))
    assert answer.calls == expected
    assert answer.content == expected_content(stretches)
    assert answer.is_complete
    assert answer == parse(HERMES, [text]) == parse(HERMES, list(text))


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
    text = space + ("<|python_tag|>" if is_tagged and format is LLAMA3 else "") + separator.join(c for c, _ in found)
    if is_tagged and format is GENERIC:
        text = f"{space}[{', '.join(call for call, _ in found)}{space}]"
    answer = parse(format, cut(text, cuts))
    found_calls = [parts for _, parts in found]
    assert answer == Answer("", found_calls) == parse(format, list(text))


@given(
    st.lists(calls(key="arguments", forms=CLOSED), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), min_size=1, max_size=3),
    st.sampled_from(["", "[ARGS]", "[CALL_ID]123456789[ARGS]"]),
    st.sampled_from(["", "Let me see. "]),
    CUTS,
)
def test_mistral(array: list[tuple[str, Call]], named: list[Call], head: str, content: str, cuts: list[int]) -> None:
    hidden = MISTRAL_TOKENS
    text = f"{content}[TOOL_CALLS] [{', '.join(call for call, _ in array)}]"
    assert parse(MISTRAL, cut(text, cuts), hidden=hidden) == Answer(content, [parts for _, parts in array])
    text = content + "".join(f"[TOOL_CALLS]{name}{head}{arguments}" for name, arguments in named)
    for format in (MISTRAL, MISTRAL_NAMES):
        assert parse(format, cut(text, cuts), hidden=hidden) == Answer(content, named) == parse(format, list(text))


# Arbitrary text.

SOUP_PIECES = (
    '<tool_call>~</tool_call>~[TOOL_CALLS]~<|python_tag|>~<tool~[~]~{~}~"~,~:~;~ ~\n~\\~f~é~[ARGS]~"name"~"f"'
    '~"arguments"~{"name": "f", "arguments": {~"name": "f"~"arguments": {}~{"name": "get_weather", "parameters": {}}'
)
SOUP = st.lists(st.sampled_from(SOUP_PIECES.split("~")), max_size=15).map("".join)


def is_subsequence(part: str, whole: str) -> bool:
    chars = iter(whole)
    return all(char in chars for char in part)


@given(
    st.sampled_from([HERMES, LLAMA3, MISTRAL, MISTRAL_NAMES, GENERIC]),
    SOUP,
    CUTS,
    st.booleans(),
)
def test_any_text_reads_the_same_in_any_pieces(format: ToolFormat, text: str, cuts: list[int], parallel: bool) -> None:
    whole = parse(format, [text], parallel=parallel)
    assert parse(format, cut(text, cuts), parallel=parallel) == whole
    assert parse(format, list(text), parallel=parallel) == whole
    assert is_subsequence(whole.content, text)
    if not whole.calls:
        assert whole.content == text
    for _, arguments in whole.calls:
        assert arguments in text or arguments == "{}"
    if not parallel:
        assert len(whole.calls) <= 1


# Single cases.


def test_arguments_are_streamed_as_they_come() -> None:
    parser = ToolParser(HERMES, NAMES)
    text = '<tool_call>\n{"name": "f", "arguments": {"a": [1, 2]}}\n</tool_call>'
    begin = text.index('{"a"')
    assert parser.push(text[:begin]) == []
    streamed = [[part.text for part in parser.push(char)] for char in text[begin:]]
    assert streamed == [["f", "{"], *([char] for char in '"a": [1, 2]}'), *([] for _ in "}\n</tool_call>")]
    assert parser.finish() == []


def test_content_is_held_only_where_a_call_may_begin() -> None:
    parser = ToolParser(HERMES, NAMES)
    streamed = [[part.text for part in parser.push(piece)] for piece in ("Hi <", "b> <tool", "_call", "er>")]
    assert streamed == [["Hi "], ["<b> "], [], ["<tool_caller>"]]


@pytest.mark.parametrize("format", [HERMES, LLAMA3, MISTRAL, GENERIC])
def test_json_answers_are_content(format: ToolFormat) -> None:
    for text in ('{"name": "Bob", "age": 5}', '[1, 2, {"name": "f"}]', '{"name": "f", "arguments": 5}', "[]", "{", "["):
        assert parse(format, list(text)) == Answer(text)


def test_json_answers_are_streamed_once_their_first_key_is_known() -> None:
    parser = ToolParser(GENERIC, NAMES)
    streamed = [[part.text for part in parser.push(piece)] for piece in (" {", '"answ', 'er"', ': "', "4")]
    assert streamed == [[], [], [' {"answer"'], [': "'], ["4"]]


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
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse(HERMES, list(call + "\n" + call), parallel=False) == Answer("\n" + call, [("f", "{}")])
    array = '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]'
    answer = parse(MISTRAL, list(array), parallel=False, hidden=("[TOOL_CALLS]",))
    assert answer == Answer(', {"name": "f", "arguments": {}}]', [("f", "{}")])


def test_without_tools_all_is_content() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = ToolParser(GENERIC, {})
    assert parser.push(text) == [(PartKind.CONTENT, text)]
    assert parser.finish() == []


def test_hidden_markers_are_no_content() -> None:
    for text, content in [
        ("[TOOL_CALLS]nothing", "nothing"),
        ("a[TOOL_CALLS]f[ARGS]", "af"),
        ("[ARGS]a[TOOL_CALLS]b[", "ab["),
        ('[TOOL_CALLS][{"name": "x", "arguments": {}}]', '[{"name": "x", "arguments": {}}]'),
    ]:
        assert parse(MISTRAL, list(text), hidden=MISTRAL_TOKENS).content == content
        assert parse(MISTRAL, list(text)).content == text


TAGGED = TaggedArguments("<parameter=", ">\n", "\n</parameter>\n", is_padded=True)
QWEN = ToolFormat("", before_name="<tool_call>\n<function=", after_name=">\n", arguments=TAGGED)


@pytest.mark.long
@pytest.mark.checklist("C24")
@pytest.mark.parametrize(
    ("format", "opening", "unit"),
    [
        *((GENERIC, "", unit) for unit in (" \n", "[", '{"arguments":{"a":', '<tool_call>{"', " <tool_call>[", '{"\\')),
        (GENERIC, '<tool_call>{"name": "f", "arguments": {', '{"arguments":{"a":'),
        (GENERIC, '<tool_call>{"arguments": {"', '<tool_call>{"'),
        (QWEN, "<tool_call><function=f><parameter=a>", "\n</par"),
        (QWEN, "<tool_call><function=f>", "<parameter=a>1</parameter>"),
        (QWEN, "", "<tool_call><function=f"),
        (PYTHONIC, "[f(a='", "\\'"),
        (PYTHONIC, "[f(a=", "[1,"),
        (PYTHONIC, "", "[f(a=1),"),
    ],
)
def test_time_is_linear(format: ToolFormat, opening: str, unit: str) -> None:
    """Also if the text is nested or held back to the end."""

    def prepare(size: int) -> Callable[[], object]:
        text = opening + unit * (size // len(unit))

        def work() -> None:
            parser = ToolParser(format, NAMES)
            for begin in range(0, len(text), 4):
                parser.push(text[begin : begin + 4])
                assert parser.num_held >= 0  # as the server asks after each token
            parser.finish()

        return work

    check_growth(prepare, 1 << 14)
