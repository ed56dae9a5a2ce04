"""The text of one choice, with stop strings, `min_tokens` and offsets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.choice_text import ChoiceText, token_text
from tests.support.byte_tokenizer import BytesTokenizer, split_at


def tokenizer_of(*tokens: str | bytes) -> BytesTokenizer:
    return BytesTokenizer([token.encode() if isinstance(token, str) else token for token in tokens])


def ids(tokenizer: BytesTokenizer) -> list[int]:
    return list(range(len(tokenizer.tokens)))


def test_stops_at_the_token_that_completes_a_stop_string() -> None:
    tokenizer = tokenizer_of("Hello", " wor", "ld", "!", " more")
    choice = ChoiceText(tokenizer, stop=["world"], track_offsets=True)
    assert choice.push([0, 1]) == "Hello "
    assert choice.push([2, 3, 4]) == ""
    assert choice.stopped == "world"
    assert choice.num_tokens == 3
    assert choice.offsets == [0, 5, 9]
    assert choice.push([4]) == ""
    assert choice.finish() == ""
    assert choice.num_tokens == 3


def test_text_after_the_stop_in_the_same_token_is_dropped() -> None:
    choice = ChoiceText(tokenizer_of("a.b"), stop=["."], include_stop=True)
    assert choice.push([0]) == "a."
    assert choice.stopped == "."


def test_finish_releases_what_was_held() -> None:
    choice = ChoiceText(tokenizer_of("a", "EN", b"\xf0\x9f"), stop=["END"])
    assert choice.push([0, 1]) == "a"
    assert choice.push([2]) == ""
    assert choice.finish() == "EN\ufffd"
    assert choice.stopped is None


@pytest.mark.checklist("D03")
def test_stop_inside_a_multi_byte_token_sequence() -> None:
    data = "x😀y".encode()
    tokenizer = BytesTokenizer([data[i : i + 2] for i in range(0, len(data), 2)])
    choice = ChoiceText(tokenizer, stop=["😀"])
    assert choice.push(ids(tokenizer)) == "x"
    assert choice.num_tokens == 3


@pytest.mark.parametrize(("min_tokens", "text", "num_tokens"), [(0, "", 1), (1, ".a", 3), (3, ".a.b", 5), (9, None, 6)])
def test_stop_strings_are_not_searched_in_the_first_tokens(min_tokens: int, text: str | None, num_tokens: int) -> None:
    tokenizer = tokenizer_of(".", "a", ".", "b", ".", "c")
    choice = ChoiceText(tokenizer, stop=["."], min_tokens=min_tokens)
    released = choice.push(ids(tokenizer)) + choice.finish()
    assert released == (".a.b.c" if text is None else text)
    assert choice.num_tokens == num_tokens


def test_stop_string_must_begin_after_the_first_tokens() -> None:
    choice = ChoiceText(tokenizer_of("a<", "/s>", "b</s>"), stop=["</s>"], min_tokens=1)
    assert choice.push([0]) == "a<"  # not held back: no stop string can start here
    assert choice.push([1, 2]) == "/s>b"
    assert choice.stopped == "</s>"


def test_character_begun_in_the_first_tokens_is_searched_where_it_is_complete() -> None:
    choice = ChoiceText(tokenizer_of(b"\xc3", b"\xa9"), stop=["é"], min_tokens=1)
    assert choice.push([0, 1]) == ""
    assert choice.stopped == "é"


def test_special_tokens() -> None:
    tokenizer = BytesTokenizer([b"<s>", b"hi"], special_ids=[0])
    assert ChoiceText(tokenizer).push([0, 1, 0]) == "hi"
    shown = ChoiceText(tokenizer, skip_special_tokens=False, stop=["<s>"])
    assert shown.push([1, 0, 1]) == "hi"
    assert shown.stopped == "<s>"


def test_offsets_of_tokens_that_begin_or_end_inside_a_character() -> None:
    tokenizer = tokenizer_of("ab", b" \xf0\x9f", b"\x98\x80", "c", b"\xf0", "d")
    choice = ChoiceText(tokenizer, track_offsets=True)
    text = choice.push(ids(tokenizer)) + choice.finish()
    assert text == "ab 😀c\ufffdd"
    assert choice.offsets == [0, 2, 3, 4, 5, 6]


def test_offsets_are_optional() -> None:
    choice = ChoiceText(tokenizer_of("a"))
    choice.push([0])
    assert choice.offsets == []


@given(
    st.text("ab😀", max_size=12),
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.text("ab😀", min_size=1, max_size=3), max_size=3),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_result_does_not_depend_on_how_tokens_are_grouped(
    text: str, cuts: list[int], stops: list[str], min_tokens: int, num_per_push: int
) -> None:
    tokenizer = BytesTokenizer(split_at(text.encode(), cuts))

    def run(num_per_push: int) -> tuple[str, str | None, int, list[int]]:
        choice = ChoiceText(tokenizer, stop=stops, min_tokens=min_tokens, track_offsets=True)
        pieces = [choice.push(ids(tokenizer)[i : i + num_per_push]) for i in range(0, len(cuts) + 1, num_per_push)]
        return "".join(pieces) + choice.finish(), choice.stopped, choice.num_tokens, choice.offsets

    whole = run(len(cuts) + 1)
    assert run(num_per_push) == whole
    released, stopped, num_tokens, offsets = whole
    assert text.startswith(released)
    assert len(offsets) == num_tokens
    assert (stopped is None) == (released == text)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b" hello", " hello"),
        ("é😀".encode(), "é😀"),
        (b"", ""),
        (b"\\n", "\\n"),
        (b"\xf0\x9f", "bytes:\\xf0\\x9f"),
        (b" \xe2\x80", "bytes: \\xe2\\x80"),
        (b"\n\\\xff\x7f", "bytes:\\x0a\\x5c\\xff\\x7f"),
    ],
)
def test_token_text(data: bytes, expected: str) -> None:
    assert token_text(BytesTokenizer([data]), 0) == expected
