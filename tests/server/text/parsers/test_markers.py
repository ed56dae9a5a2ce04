"""Markers in text that arrives in pieces, against a search of the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.markers import Markers

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


def test_removes_all() -> None:
    assert Markers(["<a>", "[b]"]).remove("x<a>y[b]<a><a") == "xy<a"
    assert Markers([]).remove("x<a>") == "x<a>"
