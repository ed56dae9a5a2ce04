"""Conversion of engine events to the deltas of one choice."""

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.api.completions.writer import CompletionWriter
from server.generation.choice_delta import ChoiceDelta
from server.generation.choice_state import ChoiceState
from server.generation.endpoint import AnswerMetadata
from server.text.tokenizer import Tokenizer
from tests.support.deltas import NO_LOGPROBS, content, make_choice
from tests.support.growth import check_growth

EOS = 256


def run(
    choice: ChoiceState, batches: list[list[int]], end: FinishReason, stop_token_id: int | None
) -> list[ChoiceDelta]:
    """Return the deltas of a choice whose tokens arrive in these batches. The last one ends it."""
    deltas = []
    for index, token_ids in enumerate(batches):
        event = TokenEvent(request_id="r", token_ids=token_ids, logprobs=[NO_LOGPROBS] * len(token_ids))
        if index == len(batches) - 1:
            event.finish_reason, event.stop_token_id = end, stop_token_id
        deltas.append(choice.push(event))
        if choice.finish_reason is not None:
            break
    return deltas


def cut(items: list[int], cuts: list[int]) -> list[list[int]]:
    ends = sorted({min(c, len(items)) for c in cuts} | {len(items)})
    return [items[a:b] for a, b in zip([0, *ends], ends, strict=False)]


TEXTS = st.text(alphabet="ab é€👩\u200d", max_size=20)


@given(
    text=TEXTS,
    junk=st.binary(max_size=3),
    stop=st.lists(st.text(alphabet="ab é€", min_size=1, max_size=3), max_size=3),
    include_stop=st.booleans(),
    ends_by_token=st.booleans(),
    cuts=st.lists(st.integers(1, 60), max_size=10),
)
def test_a_choice_does_not_depend_on_how_its_tokens_arrive(
    tokenizer: Tokenizer,
    text: str,
    junk: bytes,
    stop: list[str],
    include_stop: bool,
    ends_by_token: bool,
    cuts: list[int],
) -> None:
    token_ids = list(text.encode() + junk) + ([EOS] if ends_by_token else [])
    end = (FinishReason.STOP, EOS) if ends_by_token else (FinishReason.LENGTH, None)
    whole = run(make_choice(tokenizer, stop=stop, include_stop=include_stop), [token_ids], *end)
    choice = make_choice(tokenizer, stop=stop, include_stop=include_stop)
    deltas = run(choice, cut(token_ids, cuts), *end)
    assert "".join(delta.text for delta in deltas) == whole[0].text
    assert [p for delta in deltas for p in delta.positions] == whole[0].positions
    assert deltas[-1].finish_reason == whole[0].finish_reason
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    # Compare with decoding all bytes at once.
    decoded = (text.encode() + junk).decode("utf-8", "replace")
    ends = [(decoded.find(s) + len(s), -len(s), s) for s in stop if s in decoded]
    if ends:
        position, negative_length, _ = min(ends)
        expected = decoded[: position if include_stop else position + negative_length]
        assert (whole[0].text, whole[0].finish_reason) == (expected, "stop")
    else:
        assert whole[0].text == decoded
        assert whole[0].finish_reason == end[0].value
        assert choice.num_tokens == len(token_ids)
        assert [p.token_id for p in whole[0].positions] == token_ids


@given(text=TEXTS, stop=st.text(alphabet="ab é€", min_size=1, max_size=3))
def test_positions_cover_the_text_and_no_more(tokenizer: Tokenizer, text: str, stop: str) -> None:
    (delta,) = run(make_choice(tokenizer, stop=[stop]), [[*text.encode(), EOS]], FinishReason.STOP, EOS)
    covered = bytes(p.token_id for p in delta.positions if p.token_id != EOS)
    assert covered.decode() == delta.text
    for position in delta.positions:
        assert position.offset <= len(delta.text)
        if position.token_id != EOS:
            assert position.token_id in delta.text[position.offset].encode()


@pytest.mark.checklist("D03")
def test_a_stream_never_shows_the_beginning_of_a_stop_string(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer, stop=["abc"])
    batches = [[byte] for byte in b"xababc"]
    deltas = run(choice, batches, FinishReason.LENGTH, None)
    assert [delta.text for delta in deltas] == ["x", "", "", "ab", "", ""]
    assert [len(delta.positions) for delta in deltas] == [1, 0, 0, 2, 0, 0]
    assert deltas[-1].finish_reason == "stop"
    assert choice.num_tokens == 6


def test_tokens_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer, stop=["b"])
    event = TokenEvent(request_id="r", token_ids=[*b"abcd", EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS)
    assert choice.push(event) == ChoiceDelta(0, [content("a")], [], "stop", stop_string="b", token_ids=[*b"ab"])
    assert choice.num_tokens == 2


@pytest.mark.checklist("D11")
def test_minus_infinity_in_an_answer(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    logprobs = TokenLogprobs.pack(-math.inf, 7, [66, 67], [-0.5, -math.inf])
    event = TokenEvent(
        request_id="r", token_ids=[65], logprobs=[logprobs], finish_reason=FinishReason.LENGTH, stop_token_id=None
    )
    writer = CompletionWriter(tokenizer, AnswerMetadata("cmpl-1", 1, "m", "fp"), None, with_logprobs=True)
    chunk = msgspec.json.decode(msgspec.json.encode(writer.chunks(choice.push(event))[0]))
    assert chunk["choices"][0]["logprobs"] == {
        "text_offset": [0],
        "token_logprobs": [-9999.0],
        "tokens": ["A"],
        "top_logprobs": [{"B": -0.5, "C": -9999.0, "A": -9999.0}],
    }


@pytest.mark.checklist("C24")
def test_many_tokens_without_text_take_linear_time(tokenizer: Tokenizer) -> None:
    """Such as control tokens, the only ones that a request may allow. Their log probabilities wait for text."""

    def prepare(num_tokens: int) -> Callable[[], object]:
        return lambda: run(make_choice(tokenizer), [[EOS]] * num_tokens, FinishReason.LENGTH, None)

    check_growth(prepare, 8000)
