"""The text before the arguments of a call is matched once it is decided, and the decision does not change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.call_head import MAX_HEAD_CHARS, MAX_KEYS, UNDECIDED, Head, KeyNames
from server.text.parsers.tool_formats import ID, INDEX, KEY, NAME

TEXT = f"<call>\nfunctions.{NAME}:{INDEX}<args>"


@pytest.mark.parametrize(
    "text", ["<call>\nfunctions.f-1:0<args>", "<call>functions.f-1:12 <args>", " <call> \n functions. f-1:0<args>"]
)
def test_white_space_is_free(text: str) -> None:
    match = Head(TEXT).match(text + "{")
    assert match is not None
    assert match.end == len(text)
    assert match.slots[NAME] == "f-1"
    for end in range(len(text)):
        assert Head(TEXT).match(text[:end]) is UNDECIDED


@pytest.mark.parametrize("text", ["<x", "<call>functions.!", "<call>functions.f:x", "<call>functions.f:0<argz"])
def test_what_does_not_match(text: str) -> None:
    assert Head(TEXT).match(text) is None


@given(
    st.lists(st.sampled_from(["<call>", "functions.", "f", ":", "0", "<args>", "{", " ", "<"]), max_size=8).map("".join)
)
def test_a_decision_does_not_change(text: str) -> None:
    decided = [match for end in range(len(text) + 1) if (match := Head(TEXT).match(text[:end])) is not UNDECIDED]
    assert decided in ([], [decided[0]] * len(decided) if decided else [])


def test_slots() -> None:
    match = Head(f'<p name="{KEY}">').match('<p name="a key">x')
    assert match is not None
    assert match.slots == {KEY: "a key"}
    match = Head(f"{ID}|{NAME}").match("call_1:2|f x")
    assert match is not None
    assert match.slots == {ID: "call_1:2", NAME: "f"}


def test_a_head_that_is_too_long_does_not_match() -> None:
    space = " " * MAX_HEAD_CHARS
    assert Head(TEXT).match(f"<call>{space}functions.f:0<args>{{") is None
    assert Head(TEXT).match(f"<call>{space}") is None


ODD = ["my city", "a:b", "<x>", 'say "q"', " lead", "a\nb", "=", ":", "", "it's"]


@pytest.mark.parametrize("after", [":", '">', "</key>"])
@pytest.mark.parametrize("name", ODD)
def test_known_names_may_have_any_characters(name: str, after: str) -> None:
    keys = KeyNames(ODD)
    for text in (name.lstrip(), f"{name.lstrip()} \n"):
        match = keys.find(f"{text}{after}12345678", after)
        assert match is not None
        assert (match.end, match.slots) == (len(text), {KEY: name})


@given(
    st.lists(st.sampled_from(["a", "b", "c", ":", "::", "</", "k>", " ", "x"]), max_size=9).map("".join),
    st.sampled_from([":", "</k>"]),
)
def test_a_decision_about_known_names_does_not_change(text: str, after: str) -> None:
    keys = KeyNames(["a ", "a:b", "b c", "a</k>b", ":", "c "])
    decided = [match for end in range(len(text) + 1) if (match := keys.find(text[:end], after)) is not UNDECIDED]
    assert decided in ([], [decided[0]] * len(decided) if decided else [])


def test_known_names_are_limited() -> None:
    names = [*(f"{number}:" for number in range(MAX_KEYS)), "late:"]
    assert KeyNames(names).find("0::1", ":") is not None
    assert KeyNames(["x:" * MAX_HEAD_CHARS]).find("x:" * 2000, ":") is None
    assert [KeyNames(names).find(text, ":") for text in ("late::1", f"0:{' ' * MAX_HEAD_CHARS}:1")] == [None] * 2
