"""The deltas of choices: made of the engine's events, joined, paced, encoded, and selected."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.api.completions.schemas import CompletionRequest
from server.api.completions.writer import CompletionWriter
from server.engine_client.streams import ReceivedEvent
from server.generation.choice import ChoiceDelta, ChoiceState, Pacer, TokenPosition, best_choices, join_deltas
from server.generation.endpoint import AnswerMetadata
from server.generation.generation import Generation
from server.generation.prompts import Prompt
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from tests.support.clients import CHAT, COMPLETIONS, ask_stream, finish_reasons, stream_texts
from tests.support.deltas import NO_LOGPROBS, content, delta, make_choice
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.support.growth import check_growth
from tests.support.serving import RunningServer

EOS = 256
REPLY = [*b"Hello, world!"]  # of the fake engine


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


TEXTS = st.text(alphabet="ab é€👩\u200d", max_size=20)
STOPS = st.text(alphabet="ab é€", min_size=1, max_size=3)


@given(
    text=TEXTS,
    junk=st.binary(max_size=3),
    stop=st.lists(STOPS, max_size=3),
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
    (whole,) = run(make_choice(tokenizer, stop=stop, include_stop=include_stop), [token_ids], *end)
    choice = make_choice(tokenizer, stop=stop, include_stop=include_stop)
    ends = sorted({min(cut, len(token_ids)) for cut in cuts} | {len(token_ids)})
    deltas = run(choice, [token_ids[a:b] for a, b in zip([0, *ends], ends, strict=False)], *end)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [p for delta in deltas for p in delta.positions] == whole.positions
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [whole.finish_reason]
    # Compare with decoding all bytes at once.
    decoded = (text.encode() + junk).decode("utf-8", "replace")
    if found := [(decoded.find(s) + len(s), -len(s)) for s in stop if s in decoded]:
        position, negative_length = min(found)
        expected = decoded[: position if include_stop else position + negative_length]
        assert (whole.text, whole.finish_reason) == (expected, "stop")
    else:
        assert (whole.text, whole.finish_reason) == (decoded, end[0].value)
        assert choice.num_tokens == len(token_ids)
        assert [p.token_id for p in whole.positions] == token_ids


@given(text=TEXTS, stop=STOPS)
def test_positions_cover_the_text_and_no_more(tokenizer: Tokenizer, text: str, stop: str) -> None:
    (delta,) = run(make_choice(tokenizer, stop=[stop]), [[*text.encode(), EOS]], FinishReason.STOP, EOS)
    assert bytes(p.token_id for p in delta.positions if p.token_id != EOS).decode() == delta.text
    for position in delta.positions:
        assert position.offset <= len(delta.text)
        if position.token_id != EOS:
            assert position.token_id in delta.text[position.offset].encode()


@pytest.mark.checklist("D03")
def test_a_stream_never_shows_the_beginning_of_a_stop_string(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer, stop=["abc"])
    deltas = run(choice, [[byte] for byte in b"xababc"], FinishReason.LENGTH, None)
    assert [delta.text for delta in deltas] == ["x", "", "", "ab", "", ""]
    assert [len(delta.positions) for delta in deltas] == [1, 0, 0, 2, 0, 0]
    assert deltas[-1].finish_reason == "stop"
    assert choice.num_tokens == 6


def test_tokens_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer, stop=["b"])
    event = TokenEvent(request_id="r", token_ids=[*b"abcd", EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS)
    assert choice.push(event) == ChoiceDelta(
        0, [content("a")], [], "stop", stop_string="b", stop_reason="b", token_ids=[*b"ab"]
    )
    assert choice.num_tokens == 2


@pytest.mark.checklist("C24")
@pytest.mark.parametrize("are_joined", [False, True])
def test_many_deltas_take_linear_time(tokenizer: Tokenizer, are_joined: bool) -> None:
    """Those of tokens without text, whose log probabilities wait for some, and those of a stream that is not read."""

    def prepare(size: int) -> Callable[[], object]:
        if not are_joined:
            return lambda: run(make_choice(tokenizer), [[EOS]] * size, FinishReason.LENGTH, None)
        deltas = [delta(content("x" * 100)) for _ in range(size)]
        return lambda: join_deltas(deltas)

    check_growth(prepare, 4000 if are_joined else 8000)


# Joining.


@pytest.mark.anyio
async def test_events_of_a_choice_in_one_batch_become_one_delta(tokenizer: Tokenizer) -> None:
    def event(index: int, text: str, reason: FinishReason | None = None) -> TokenEvent:
        logprobs, token_ids = [NO_LOGPROBS] * len(text), list(text.encode())
        return TokenEvent(request_id="r", index=index, token_ids=token_ids, logprobs=logprobs, finish_reason=reason)

    batches = [[event(0, "a")], [event(0, "b"), event(1, "x"), event(0, "cd", FinishReason.LENGTH), event(1, "y")]]
    choices = [make_choice(tokenizer, index=index) for index in range(2)]
    received = [[ReceivedEvent(0, each, 0) for each in batch] for batch in batches]
    inbox = SimpleNamespace(take=AsyncMock(side_effect=[*received, []]))
    stream = Mock(choices=[SimpleNamespace(times=None)] * 2, inbox=inbox)
    generation = Generation([Prompt([1])], [stream], choices, metrics=Metrics("", "m"), request_id="r")
    found = []
    while (deltas := await generation.next()) is not None:
        found.append([(each.index, each.text, len(each.positions), each.finish_reason) for each in deltas])
    assert found == [[(0, "a", 1, None)], [(0, "bcd", 3, "length"), (1, "xy", 2, None)]]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("num_tokens", "arriving", "expected"),
    [
        # The first and the last do not wait. `.` ends a choice.
        (1, "a b c d e.", "a b c d e."),
        (3, "a b c d e f g h.", "a bcd efg h."),
        (4, "a b c d e f g h.", "a bcde fgh."),
        (99, "a b c d e f g h.", "a bcdefgh."),
        (2, "a,A bc,B C D. .", "a,A bc BC D. ."),  # each choice has its own count
    ],
)
async def test_so_many_tokens_are_joined(num_tokens: int, arriving: str, expected: str) -> None:
    def make_delta(text: str) -> ChoiceDelta:
        """Return a delta of choice 0, or in capital letters of choice 1, with one token per letter."""
        letters = text.rstrip(".")
        end = "stop" if text != letters else None
        return ChoiceDelta(int(text.isupper()), [content(letters)], finish_reason=end, token_ids=[*letters.encode()])

    arrived = [[make_delta(text) for text in batch.split(",")] for batch in arriving.split(" ")]
    pacer = Pacer(AsyncMock(side_effect=[*arrived, None]), num_tokens)
    batches = []
    while (joined := await pacer.next()) is not None:
        batches.append(joined)
    texts = [",".join(each.text + "." * (each.finish_reason is not None) for each in batch) for batch in batches]
    assert " ".join(texts) == expected


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_chunk_every_so_many_tokens(server: RunningServer, fake_engine: FakeEngine, path: str) -> None:
    """The first and the last chunk may be smaller. Tokens that arrive together are never split."""
    fake_engine.config.step_seconds = 0.01
    fields = {"return_token_ids": True, "n": 2, "logprobs": 1 if path == COMPLETIONS else True}
    for interval, max_chunks in ((None, 14), (1, 14), (5, 4), (10**18, 2)):
        chunks = ask_stream(server.url, path, stream_interval=interval, **fields)
        for index in range(2):
            choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            parts = [choice["token_ids"] for choice in choices if choice.get("token_ids")]
            assert len(parts) <= max_chunks
            assert all(len(part) >= (interval or 1) for part in parts[1:-1])
            assert [token_id for part in parts for token_id in part] == [*REPLY, EOS_TOKEN_ID]
        assert stream_texts(chunks) == {0: "Hello, world!", 1: "Hello, world!"}
        assert finish_reasons(chunks) == {0: "stop", 1: "stop"}


# Encoding and selection.


@pytest.mark.checklist("D11")
def test_infinite_log_probabilities_are_json(tokenizer: Tokenizer) -> None:
    logprobs = TokenLogprobs.pack(-math.inf, 7, [66, 67, 68], [-0.5, -math.inf, -12345.0])
    event = TokenEvent(request_id="r", token_ids=[65], logprobs=[logprobs], finish_reason=FinishReason.LENGTH)
    body = CompletionRequest.model_validate({"prompt": "a", "logprobs": 3})
    writer = CompletionWriter(tokenizer, AnswerMetadata("cmpl-1", 1, "m", "fp"), body, [])
    chunk = msgspec.json.decode(msgspec.json.encode(writer.chunks(make_choice(tokenizer).push(event))[0]))
    found = chunk["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]
    assert found["top_logprobs"] == [{"B": -0.5, "C": -9999.0, "D": -9999.0, "A": -9999.0}]


def test_best_choices_have_the_highest_mean() -> None:
    """They are selected per prompt and sorted best first; ties keep their order."""
    logprobs = [[-3.0], [-1.0, -2.0], [-1.0], [-9.0], [], [-9.0, -9.0]]
    positions = [[TokenPosition(65, TokenLogprobs.pack(x, 1, [], []), 0) for x in each] for each in logprobs]
    wholes = [ChoiceDelta(index, [content(f"{index}")], own) for index, own in enumerate(positions)]
    best = best_choices(wholes, 3, 2)
    assert [(delta.index, delta.text) for delta in best] == [(0, "2"), (1, "1"), (2, "3"), (3, "5")]
    assert best_choices(wholes, 3, 3) is wholes
