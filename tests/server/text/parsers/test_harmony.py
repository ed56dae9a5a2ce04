"""Answers in the harmony format, compared with OpenAI's parser."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_harmony import Role, StreamableParser, StreamState, TextContent

from server.text.parsers.harmony import MARKERS, MAX_HEADER_CHARS, HarmonyFormat, HarmonyParser, is_harmony
from tests.support.harmony import decode_pieces, harmony_encoding
from tests.support.parsing import cut, joined_parts

TOOLS: dict[str, dict[str, Any]] = {"weather": {}, "time-2": {}}
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
NEXT = "<|start|>assistant"

Parts = list[tuple[str, str]]


def parse(pieces: list[str], *, hidden: tuple[str, ...] = MARKERS, **fields: Any) -> Parts:
    return joined_parts(HarmonyParser(HarmonyFormat(tools=TOOLS, **fields), hidden=hidden), pieces)


def reference(token_ids: list[int]) -> Parts:
    """Return the parts of an answer as OpenAI's parser reads it."""
    found: Parts = []
    for message in harmony_encoding().parse_messages_from_completion_tokens(token_ids, Role.ASSISTANT):
        text = "".join(content.text for content in message.content if isinstance(content, TextContent))
        recipient = message.recipient or ""
        if recipient.startswith("functions."):
            found += [("call", recipient.removeprefix("functions.")), ("arguments", text.strip())]
        elif text:
            kind = "reasoning" if message.channel == "analysis" or recipient else "content"
            text = "\n\n" + text if kind in [earlier for earlier, _ in found] else text
            before = found.pop()[1] if found and found[-1][0] == kind else ""
            found.append((kind, before + text))
    return found


words = st.text(st.sampled_from('ab c\n{}<|"\\é東🙂'), max_size=12)
BUILTIN = [f"{c} to={t} code" for c in ("analysis", "commentary") for t in ("python", "browser.search", "container.x")]
plain = st.builds(
    lambda channel, text: (f"<|channel|>{channel}<|message|>", text),
    st.sampled_from(["analysis", "commentary", "final"]) | st.sampled_from(BUILTIN),
    words,
)
CHANNELS = ("<|channel|>commentary to=functions.{}", "<|channel|>analysis to=functions.{}")
HEADERS = (
    *(CHANNELS[0] + after + "<|message|>" for after in (" <|constrain|>json", "<|constrain|>json", " json", "")),
    CHANNELS[1] + " <|constrain|>json<|message|>",
    " to=functions.{}<|channel|>commentary json<|message|>",
    " to=functions.{}<|channel|>commentary <|constrain|>json<|message|>",
    " to=functions.{}<|message|>",
)
calls = st.builds(
    lambda header, name, arguments, space: (header.format(name), space + json.dumps(arguments) + space),
    st.sampled_from(HEADERS),
    st.sampled_from(sorted(TOOLS)),
    st.dictionaries(words, words | st.lists(words, max_size=2) | st.integers(), max_size=2),
    st.sampled_from(["", "\n", " "]),
)
answers = st.lists(plain | calls, min_size=1, max_size=6)


def write(messages: list[tuple[str, str]]) -> str:
    """Return the messages as the model writes them, without the token that ends the answer."""
    ends = ["<|call|>" if " to=" in header else "<|end|>" for header, _ in messages]
    return NEXT.join(header + body + end for (header, body), end in zip(messages, ends, strict=True))


@given(answers, st.lists(st.integers(0, 400), max_size=12), st.booleans())
def test_parts_are_those_of_the_reference(messages: list[tuple[str, str]], cuts: list[int], has_end: bool) -> None:
    text = write(messages)
    text = text if has_end else text.rpartition("<|")[0]  # the engine does not return the token that ends the answer
    expected = reference(harmony_encoding().encode(text, allowed_special="all"))
    assert parse([text]) == parse(cut(text, cuts)) == parse([*text]) == expected


@given(answers)
def test_reasoning_begins_and_ends_with_the_token_of_the_reference(messages: list[tuple[str, str]]) -> None:
    token_ids = harmony_encoding().encode(write(messages), allowed_special="all")
    oracle = StreamableParser(harmony_encoding(), Role.ASSISTANT)
    parser = HarmonyParser(HarmonyFormat(tools=TOOLS))
    for token_id, piece in zip(token_ids, decode_pieces(token_ids), strict=True):
        oracle.process(token_id)
        parser.push(piece)
        recipient = oracle.current_recipient or ""
        is_reasoning = oracle.current_channel == "analysis" or recipient != ""
        assert parser.is_reasoning == (
            oracle.state is StreamState.CONTENT and is_reasoning and not recipient.startswith("functions.")
        )


def test_settings_of_the_request() -> None:
    call = [("call", "weather"), ("arguments", '{"city": "Bern"}')]
    assert parse([CALL + NEXT + CALL], parallel_calls=False) == [*call, ("content", '{"city": "Bern"}')]
    assert parse(["lo<|return|>"], is_final=True) == [("content", "lo")]
    assert is_harmony("<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>")
    assert not is_harmony("<|im_start|>assistant\nThe <|channel|> of <|message|>")


SPACED = "<|channel|> analysis<|message|> Hm<|end|><|start|> assistant<|channel|> final<|message|>  a"


MALFORMED = [
    ("  to be", [("content", "  to be")]),
    ("t", [("content", "t")]),
    (f"{FINAL}a<|end|>b", [("content", "a\n\nb")]),
    (f"{FINAL}a<|end|>\n{NEXT}{FINAL}b", [("content", "a\n\nb")]),
    (f"{FINAL}a<|message|>b<|channel|>c", [("content", "abc")]),
    ("<|message|>a", [("content", "a")]),
    (NEXT + " Hello<|end|>", [("content", "Hello")]),
    ("<|channel|>commentary to=functions.weather <|constrain|>js", []),
    ("<|channel|>analysis<|mess", []),
    ("<|", [("content", "<|")]),
    ("<|channel|>commentary to=functions.weather json<|end|>", []),
    # What gpt-oss writes now and then.
    (f"<|channel|>commentary{ANALYSIS}Hm", [("reasoning", "Hm")]),
    (f"<|channel|>commentary to=assistant{ANALYSIS}Hm", [("reasoning", "Hm")]),
    ("<|channel|>final <|constrain|>json<|message|>{}", [("content", "{}")]),
    ("<|channel|>commentary to=weather<|message|>{}", [("call", "weather"), ("arguments", "{}")]),
    # With a space after each marker.
    (SPACED, [("reasoning", "Hm"), ("content", " a")]),
    ("<|start|> assistant<|channel|> final<|constrain|> json", []),
    # No calls of the request's tools.
    ("<|channel|>commentary to=functions.rain<|message|>{}", [("content", "{}")]),
    ("<|channel|>commentary to=functions.weather<|message|>Bern", [("content", "Bern")]),
    ("<|channel|>commentary to=functions.weather<|message|><|call|>", []),
    ("<|channel|>commentary to=python<|message|>1 + 1", [("reasoning", "1 + 1")]),
]


@pytest.mark.parametrize(("text", "parts"), MALFORMED)
def test_malformed_answers(text: str, parts: Parts) -> None:
    for pieces in ([text], [*text]):
        assert parse(pieces) == parts


SOUP = [*MARKERS, "a", " ", "{", "}", '"', "to=", "functions.weather", "assistant", "analysis", "final", "json", "<|"]


@given(
    st.lists(st.sampled_from([*SOUP, "x" * 500]), max_size=15),
    st.lists(st.integers(0, 200), max_size=12),
    st.sampled_from([(), MARKERS]),
)
def test_every_split_gives_the_same(pieces: list[str], cuts: list[int], hidden: tuple[str, ...]) -> None:
    text = "".join(pieces)
    whole = parse([text], hidden=hidden)
    assert all(parse(each, hidden=hidden) == whole for each in (pieces, cut(text, cuts), [*text]))


def test_a_header_has_a_limit() -> None:
    for excess in (-1, 0, 1):
        text = "<|channel|>" + "x" * (MAX_HEADER_CHARS - 11 + excess) + "<|message|>abc"
        whole = parse([text], hidden=())
        assert whole == [("content", "abc" if excess <= 0 else text)]
        for position in range(MAX_HEADER_CHARS - 5, len(text)):
            assert parse([text[:position], text[position:]], hidden=()) == whole
    parser = HarmonyParser(HarmonyFormat())
    assert parser.push(text[:500]) == []
    assert (parser.is_holding, parser.num_held) == (True, 500)
    assert "".join(part.text for part in parser.push(text[500:])) == text
    assert not parser.is_holding


def test_whether_an_answer_ends_with_calls() -> None:
    for text, ends in ((CALL, 1), (CALL[:-10], 0), (CALL[:-8], 1), (f"{FINAL}a", 0), (f"{CALL}{NEXT}{FINAL}a", 1)):
        parser = HarmonyParser(HarmonyFormat(tools=TOOLS))
        joined_parts(parser, [text])
        assert parser.ends_with_calls == bool(ends), text
