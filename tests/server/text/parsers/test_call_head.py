"""Markers, and the text before the arguments of a call, are matched once it is decided what they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.call_head import MAX_HEAD_CHARS, MAX_KEYS, UNDECIDED, Head, KeyNames
from server.text.parsers.markers import Markers
from server.text.parsers.tool_formats import ID, INDEX, KEY, NAME

TEXT = f"<call>\nfunctions.{NAME}:{INDEX}<args>"


@pytest.mark.parametrize(
    "text", ["<call>\nfunctions.f-1:0<args>", "<call>functions.f-1:12 <args>", " <call> \n functions. f-1:0<args>"]
)
def test_white_space_is_free(text: str) -> None:
    match = Head(TEXT).match(text + "{")
    assert match is not None
    assert (match.end, match.slots[NAME]) == (len(text), "f-1")
    assert all(Head(TEXT).match(text[:end]) is UNDECIDED for end in range(len(text)))


@pytest.mark.parametrize("text", ["<x", "<call>functions.!", "<call>functions.f:x", "<call>functions.f:0<argz"])
def test_what_does_not_match(text: str) -> None:
    assert Head(TEXT).match(text) is None


def test_slots() -> None:
    match = Head(f'{ID}|{NAME}<p name="{KEY}">').match('call_1:2|f <p name="a key">x')
    assert match is not None
    assert match.slots == {ID: "call_1:2", NAME: "f", KEY: "a key"}


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


def test_known_names_are_limited() -> None:
    names = [*(f"{number}:" for number in range(MAX_KEYS)), "late:"]
    assert KeyNames(names).find("0::1", ":") is not None
    assert KeyNames(["x:" * MAX_HEAD_CHARS]).find("x:" * 2000, ":") is None
    assert [KeyNames(names).find(text, ":") for text in ("late::1", f"0:{' ' * MAX_HEAD_CHARS}:1")] == [None] * 2


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
