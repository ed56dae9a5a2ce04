"""The text of one choice, as it is streamed: with stop strings, `min_tokens` and offsets."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.text.choice_text import ChoiceText, Detokenizer, StopStringMatcher, token_text
from tests.support.growth import check_growth
from tests.support.parsing import cut


class BytesTokenizer:
    """A tokenizer whose token i is the i-th of the given byte strings."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Iterable[int] = ()) -> None:
        self.tokens = tokens
        self.special_ids = frozenset(special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


EMOJI = tuple("x😀y".encode()[start : start + 2] for start in (0, 2, 4))
HELLO = ("Hello", " wor", "ld", "!", " more")
DOTS = (".", "a", ".", "b", ".", "c")
Pushed = list[tuple[list[int], str]]  # token ids -> the text that they release


CASES = [
    (HELLO, {"stop": ["world"]}, [([0, 1], "Hello "), ([2, 3, 4], ""), ([4], "")], "", "world", 3),
    (("a", "EN", b"\xf0\x9f"), {"stop": ["END"]}, [([0, 1], "a"), ([2], "")], "EN\ufffd", None, 3),
    (EMOJI, {"stop": ["😀"]}, [([0, 1, 2], "x")], "", "😀", 3),
    # Stop strings are not searched in the first tokens, nor held back for, but wherever a character is complete.
    (DOTS, {"stop": ["."]}, [([*range(6)], "")], "", ".", 1),
    (DOTS, {"stop": ["."], "min_tokens": 1}, [([*range(6)], ".a")], "", ".", 3),
    (DOTS, {"stop": ["."], "min_tokens": 3}, [([*range(6)], ".a.b")], "", ".", 5),
    (DOTS, {"stop": ["."], "min_tokens": 9}, [([*range(6)], ".a.b.c")], "", None, 6),
    (("a<", "/s>", "b</s>"), {"stop": ["</s>"], "min_tokens": 1}, [([0], "a<"), ([1, 2], "/s>b")], "", "</s>", 3),
    ((b"\xc3", b"\xa9"), {"stop": ["é"], "min_tokens": 1}, [([0, 1], "")], "", "é", 2),
]


def push_all(choice: ChoiceText, token_ids: Sequence[int]) -> str:
    """Push tokens, up to the end of a stop string."""
    return "".join([choice.push(token_id) for token_id in token_ids if choice.stopped is None])


@pytest.mark.checklist("D02", "D03")
@pytest.mark.parametrize(("tokens", "settings", "pushed", "rest", "stopped", "num_tokens"), CASES)
def test_single_choices(
    tokens: Any, settings: dict[str, Any], pushed: Pushed, rest: str, stopped: str | None, num_tokens: int
) -> None:
    encoded = [token.encode() if isinstance(token, str) else token for token in tokens]
    choice = ChoiceText(BytesTokenizer(encoded), **settings)
    assert [push_all(choice, token_ids) for token_ids, _ in pushed] == [text for _, text in pushed]
    assert (choice.finish(), choice.stopped, choice.num_tokens) == (rest, stopped, num_tokens)


def test_special_tokens() -> None:
    tokenizer = BytesTokenizer([b"<s>", b"\xc3", b"\xa9"], special_ids=[0])
    assert push_all(ChoiceText(tokenizer), [0, 1, 0, 2, 0]) == "é"
    shown = ChoiceText(tokenizer, skip_special_tokens=False, stop=["<s>"])
    assert (push_all(shown, [1, 2, 0, 1]), shown.stopped) == ("é", "<s>")


def test_offsets_of_tokens_that_begin_or_end_inside_a_character() -> None:
    tokens = [b"ab", b" \xf0\x9f", b"\x98\x80", b"c", b"\xf0", b"d"]
    choice = ChoiceText(BytesTokenizer(tokens), track_offsets=True)
    assert push_all(choice, range(6)) + choice.finish() == "ab 😀c\ufffdd"
    assert choice.offsets == [0, 2, 3, 4, 5, 6]


@given(
    st.text("ab😀", max_size=12),
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.text("ab😀", min_size=1, max_size=3), max_size=3),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_tokens_may_be_grouped_in_any_way(
    text: str, cuts: list[int], stops: list[str], min_tokens: int, num_per_push: int
) -> None:
    tokenizer = BytesTokenizer(cut(text.encode(), cuts))

    def run(num_per_push: int) -> tuple[str, str | None, int, list[int]]:
        choice = ChoiceText(tokenizer, stop=stops, min_tokens=min_tokens, track_offsets=True)
        ids = range(len(cuts) + 1)
        pieces = [push_all(choice, ids[begin : begin + num_per_push]) for begin in ids[::num_per_push]]
        return "".join(pieces) + choice.finish(), choice.stopped, choice.num_tokens, choice.offsets

    whole = run(len(cuts) + 1)
    assert run(num_per_push) == whole
    released, stopped, num_tokens, offsets = whole
    assert text.startswith(released)
    assert len(offsets) == num_tokens
    assert (stopped is None) == (released == text)


def test_token_text() -> None:
    for text in (" hello", "é😀", "", "\\n"):
        assert token_text(BytesTokenizer([text.encode()]), 0) == text
    for data, text in ((b" \xe2\x80", "bytes: \\xe2\\x80"), (b"\n\\\xff\x7f", "bytes:\\x0a\\x5c\\xff\\x7f")):
        assert token_text(BytesTokenizer([data]), 0) == text


# The streamed text equals the decoded whole, for any bytes and any split into tokens.


# Bytes that often form invalid or incomplete characters: leads, continuations, overlong forms, surrogates.
tricky = st.sampled_from(b"\x00a\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xe0\xe2\xed\xef\xf0\xf4\xf5\xff")
any_bytes = st.one_of(st.binary(max_size=40), st.lists(tricky).map(bytes), st.text(max_size=15).map(str.encode))
cut_positions = st.lists(st.integers(0, 60), max_size=20)


@pytest.mark.checklist("D01")
@given(any_bytes, cut_positions)
@example(b"\xed\xa0\x80", [1, 2])
@example(b"\xf0\x9f\x98", [1, 2])
@example(b"\xe0\x80", [1])
def test_stream_equals_whole_for_any_bytes_and_split(data: bytes, cuts: list[int]) -> None:
    tokens = cut(data, cuts)
    detokenizer = Detokenizer(BytesTokenizer(tokens))
    pieces = [detokenizer.push(token_id) for token_id in range(len(tokens))]
    assert "".join(pieces) + detokenizer.flush() == data.decode("utf-8", "replace")


@pytest.mark.checklist("D01")
@given(st.text(max_size=20), cut_positions, st.integers(1, 5))
def test_valid_text_streams_only_whole_characters(text: str, cuts: list[int], num_per_push: int) -> None:
    tokens = cut(text.encode(), cuts)
    detokenizer = Detokenizer(BytesTokenizer(tokens))
    seen, num_bytes = "", 0
    for begin in range(0, len(tokens), num_per_push):
        pushed = range(len(tokens))[begin : begin + num_per_push]
        seen += "".join(map(detokenizer.push, pushed))
        num_bytes += sum(len(tokens[i]) for i in pushed)
        assert seen == text.encode()[:num_bytes].decode("utf-8", "ignore")
    assert seen == text
    assert detokenizer.flush() == ""


@given(any_bytes, cut_positions)
def test_offset_is_the_character_in_which_a_token_begins(data: bytes, cuts: list[int]) -> None:
    tokens = cut(data, cuts)
    detokenizer = Detokenizer(BytesTokenizer(tokens))
    for token_id, token in enumerate(tokens):
        before = b"".join(tokens[:token_id])
        # The token's first byte adds its character to the text, unless it is inside the last character.
        expected = len((before + token[:1]).decode("utf-8", "replace")) - 1 if token else None
        assert expected is None or detokenizer.offset(token_id) == expected
        detokenizer.push(token_id)


# Stop strings, against a plain search at every position.


stop_texts = st.text("ab", max_size=20) | st.text("ab😀é", max_size=12)
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
@given(stop_texts, stop_lists, st.lists(st.integers(0, 20), max_size=20), st.booleans())
@example("abab", ["bab", "ab"], [1, 2, 3], False)
@example("aab", ["ab", "aab"], [], False)
@example("aaab", ["aab"], [1, 2, 3], False)
@example("a\n\nUser: hello", ["\n\nUser:", "\nUser:"], [3, 4, 8], False)
@example("abc]^-\\[a\nd", ["\n", "\\[a", "z"], [3, 4, 5, 6], False)
@example("a^-]b", ["]", "-]", "^a"], [1, 2, 3], False)
def test_agrees_with_a_plain_search(text: str, stops: list[str], cuts: list[int], include_stop: bool) -> None:
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


@pytest.mark.long
@pytest.mark.checklist("C11")
def test_time_grows_linearly_with_a_repetitive_stop_string() -> None:
    """Searches 'aaaa...' for 'aaa...ab', which fails as late as possible at every position."""

    def prepare(size: int) -> Callable[[], object]:
        matcher = StopStringMatcher(["a" * size + "b", "a" * (size - 100) + "c"])
        return lambda: [matcher.push("aaaa") for _ in range(size)]

    check_growth(prepare, 2000)
