"""The text of one choice, with stop strings, `min_tokens` and offsets."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.choice_text import ChoiceText, token_text
from tests.support.byte_tokenizer import BytesTokenizer, split_at


def tokenizer_of(*tokens: str | bytes) -> BytesTokenizer:
    return BytesTokenizer([token.encode() if isinstance(token, str) else token for token in tokens])


def ids(tokenizer: BytesTokenizer) -> list[int]:
    return list(range(len(tokenizer.tokens)))


EMOJI = tuple("x😀y".encode()[start : start + 2] for start in (0, 2, 4))
HELLO = ("Hello", " wor", "ld", "!", " more")
DOTS = (".", "a", ".", "b", ".", "c")
Pushed = list[tuple[list[int], str]]  # token ids -> the text that they release


@pytest.mark.checklist("D03")
@pytest.mark.parametrize(
    ("tokens", "settings", "pushed", "rest", "stopped", "num_tokens"),
    [
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
    ],
)
def test_single_choices(
    tokens: tuple[str | bytes, ...],
    settings: dict[str, Any],
    pushed: Pushed,
    rest: str,
    stopped: str | None,
    num_tokens: int,
) -> None:
    choice = ChoiceText(tokenizer_of(*tokens), **settings)
    assert [choice.push(token_ids) for token_ids, _ in pushed] == [text for _, text in pushed]
    assert (choice.finish(), choice.stopped, choice.num_tokens) == (rest, stopped, num_tokens)


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
