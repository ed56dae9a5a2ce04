"""The streamed text equals the decoded whole, for any bytes and any split into tokens."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from tests.support.byte_tokenizer import BytesTokenizer, split_at

# Bytes that often form invalid or incomplete characters: leads, continuations, overlong forms, surrogates.
tricky_bytes = st.lists(st.sampled_from(b"\x00a\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xe0\xe2\xed\xef\xf0\xf4\xf5\xff")).map(
    bytes
)
any_bytes = st.one_of(st.binary(max_size=40), tricky_bytes, st.text(max_size=15).map(str.encode))
cut_positions = st.lists(st.integers(0, 60), max_size=20)


@pytest.mark.checklist("D01")
@given(any_bytes, cut_positions)
@example(b"\xed\xa0\x80", [1, 2])
@example(b"\xf0\x9f\x98", [1, 2])
@example(b"\xe0\x80", [1])
def test_stream_equals_whole_for_any_bytes_and_split(data: bytes, cuts: list[int]) -> None:
    tokens = split_at(data, cuts)
    detokenizer = Detokenizer(BytesTokenizer(tokens))
    pieces = [detokenizer.push([token_id]) for token_id in range(len(tokens))]
    assert "".join(pieces) + detokenizer.flush() == data.decode("utf-8", "replace")


@pytest.mark.checklist("D01")
@given(st.text(max_size=20), cut_positions, st.integers(1, 5))
def test_valid_text_streams_only_whole_characters(text: str, cuts: list[int], num_per_push: int) -> None:
    tokens = split_at(text.encode(), cuts)
    detokenizer = Detokenizer(BytesTokenizer(tokens))
    seen, num_bytes = "", 0
    for begin in range(0, len(tokens), num_per_push):
        pushed = range(len(tokens))[begin : begin + num_per_push]
        seen += detokenizer.push(pushed)
        num_bytes += sum(len(tokens[i]) for i in pushed)
        assert seen == text.encode()[:num_bytes].decode("utf-8", "ignore")
    assert seen == text
    assert detokenizer.flush() == ""


@given(any_bytes, cut_positions)
def test_offset_is_the_character_in_which_a_token_begins(data: bytes, cuts: list[int]) -> None:
    tokens = split_at(data, cuts)
    detokenizer = Detokenizer(BytesTokenizer(tokens))
    for token_id, token in enumerate(tokens):
        before = b"".join(tokens[:token_id])
        # The token's first byte adds its character to the text, unless it is inside the last character.
        expected = len((before + token[:1]).decode("utf-8", "replace")) - 1 if token else None
        assert expected is None or detokenizer.offset(token_id) == expected
        detokenizer.push([token_id])


@pytest.mark.parametrize("text", ["😀", "日本語", "👩‍👩‍👧‍👦", "é", "\ufeffa", "\u2028", "\x00"])
def test_one_byte_at_a_time(text: str) -> None:
    data = text.encode()
    detokenizer = Detokenizer(BytesTokenizer([bytes([byte]) for byte in data]))
    pieces = [detokenizer.push([i]) for i in range(len(data))]
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.checklist("D02")
def test_unfinished_character_becomes_one_replacement() -> None:
    detokenizer = Detokenizer(BytesTokenizer([b"ok \xf0\x9f\x98"]))
    assert detokenizer.push([0]) == "ok "
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_are_skipped_by_default() -> None:
    tokenizer = BytesTokenizer([b"<s>", b"\xc3", b"\xa9"], special_ids=[0])
    assert Detokenizer(tokenizer).push([0, 1, 0, 2, 0]) == "é"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push([0, 1, 2, 0]) == "<s>é<s>"
