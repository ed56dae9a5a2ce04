"""The stop string matcher against a plain search at every position."""

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.text.stop_strings import StopStringMatcher
from tests.server.text.parsers.test_tool_parser import cut
from tests.support.growth import check_growth

texts = st.text("ab", max_size=20) | st.text("ab😀é", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5) | st.text("ab😀é", min_size=1, max_size=4), max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[str, str] | None:
    """Return the text before the match that is complete first, and the longest stop string that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return None


def must_hold(text: str, stops: list[str]) -> int:
    """Return how many characters at the end of a text without a match may still become one."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


@pytest.mark.checklist("D03", "D04")
@given(texts, stop_lists, st.lists(st.integers(0, 20), max_size=20), st.booleans())
@example("abab", ["bab", "ab"], [1, 2, 3], False)
@example("aab", ["ab", "aab"], [], False)
@example("aaab", ["aab"], [1, 2, 3], False)
def test_agrees_with_a_plain_search_for_every_split(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    matcher = StopStringMatcher(stops, include_stop=include_stop)
    released, seen = "", ""
    for piece in cut(text, cuts):
        released += matcher.push(piece)
        seen += piece
        if matcher.matched is None:  # all text that can be returned was returned
            assert released == seen[: len(seen) - must_hold(seen, stops)]
    expected = first_match(text, stops)
    if expected is None:
        assert matcher.matched is None
        assert released + matcher.flush() == text
    else:
        before, stop = expected
        assert matcher.matched == stop
        assert released == before + (stop if include_stop else "")
        assert matcher.flush() == ""


@pytest.mark.checklist("D04")
@pytest.mark.parametrize(
    ("stops", "pushed", "matched", "rest"),
    [
        (["END"], [("a E", "a "), ("N", ""), ("X", "ENX"), (" EN", " ")], None, "EN"),  # held until it fails
        (["\n\nUser:", "\nUser:"], [("a\n\n", "a"), ("\n", "\n"), ("User", ""), (": hello", "")], "\n\nUser:", ""),
        (["stop", "st"], [("stop", "")], "st", ""),  # complete first
        *(([each, "z"], [(f"abc{each}d", "abc"), ("e", "")], each, "") for each in ("]", "^", "-", "\\", "[a", "\n")),
        ([], [("anything", "anything")], None, ""),
    ],
)
def test_single_cases(stops: list[str], pushed: list[tuple[str, str]], matched: str | None, rest: str) -> None:
    matcher = StopStringMatcher(stops)
    assert [matcher.push(text) for text, _ in pushed] == [released for _, released in pushed]
    assert (matcher.matched, matcher.flush(), matcher.flush()) == (matched, rest, "")


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        StopStringMatcher(["a", ""])


@pytest.mark.long
@pytest.mark.checklist("C11")
def test_time_grows_linearly_with_a_repetitive_stop_string() -> None:
    """Searches 'aaaa...' for 'aaa...ab', which fails as late as possible at every position."""

    def prepare(size: int) -> Callable[[], object]:
        matcher = StopStringMatcher(["a" * size + "b", "a" * (size - 100) + "c"])
        return lambda: [matcher.push("aaaa") for _ in range(size)]

    check_growth(prepare, 2000)
