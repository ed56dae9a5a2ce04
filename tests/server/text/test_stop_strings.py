"""The stop string matcher against a plain search at every position."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.text.stop_strings import StopStringMatcher

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


def cut(text: str, cuts: list[int]) -> list[str]:
    ends = sorted(min(position, len(text)) for position in cuts)
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)], strict=True)]


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


def test_partial_match_is_held_and_released_when_it_fails() -> None:
    matcher = StopStringMatcher(["END"])
    assert [matcher.push(piece) for piece in ["a E", "N", "X", " EN"]] == ["a ", "", "ENX", " "]
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_overlapping_starts_hold_only_what_can_still_match() -> None:
    matcher = StopStringMatcher(["\n\nUser:", "\nUser:"])
    assert matcher.push("a\n\n") == "a"
    assert matcher.push("\n") == "\n"
    assert matcher.push("User") == ""
    assert matcher.push(": hello") == ""
    assert matcher.matched == "\n\nUser:"


def test_nothing_follows_a_match() -> None:
    matcher = StopStringMatcher(["."])
    assert matcher.push("One. Two.") == "One"
    assert matcher.push("Three") == ""
    assert matcher.flush() == ""


@pytest.mark.checklist("D04")
def test_whole_output_can_be_the_stop() -> None:
    matcher = StopStringMatcher(["stop", "st"])
    assert matcher.push("stop") == ""
    assert matcher.matched == "st"  # complete first


def test_included_stop_is_released_with_the_text() -> None:
    matcher = StopStringMatcher(["</x>"], include_stop=True)
    assert matcher.push("a<") + matcher.push("/x>b") == "a</x>"


def test_first_characters_that_mean_something_in_a_pattern() -> None:
    for stop in ("]", "^", "-", "\\", "[a", "\n"):
        matcher = StopStringMatcher([stop, "z"])
        assert matcher.push(f"abc{stop}d") == "abc"
        assert matcher.matched == stop


def test_without_stops_all_text_passes() -> None:
    matcher = StopStringMatcher([])
    assert matcher.push("anything") == "anything"
    assert matcher.matched is None


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        StopStringMatcher(["a", ""])


@pytest.mark.checklist("C11")
def test_time_grows_linearly_with_a_repetitive_stop_string() -> None:
    """Searches 'aaaa...' for 'aaa...ab', which fails as late as possible at every position."""

    def seconds(num_chars: int) -> float:
        matcher = StopStringMatcher(["a" * 1000 + "b", "a" * 900 + "c"])
        begin = time.process_time()
        for _ in range(num_chars // 4):
            matcher.push("aaaa")
        return time.process_time() - begin

    small = min(seconds(20_000) for _ in range(3))
    assert min(seconds(80_000) for _ in range(3)) < 4 * small * 2
    assert small < 0.5  # a plain search would compare 20 million characters
