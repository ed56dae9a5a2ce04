"""The parts of `server.generate`: parameters, choices, prompts, and the frame of events."""

import math
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.api.chat.schemas import ChatCompletionRequest
from server.api.completions.schemas import CompletionRequest
from server.api.completions.writer import CompletionWriter
from server.generation.choice_state import ChoiceState, Delta, Position, best_choices, json_logprob
from server.generation.endpoint import Head
from server.generation.event_writer import frame_chunks
from server.generation.generation import Generation
from server.generation.parameters import (
    HARMLESS,
    MAX_WARNINGS_CHARS,
    UNSUPPORTED,
    choose_seed,
    prompt_seed,
    unknown_parameters,
    warnings_header,
)
from server.generation.prompts import MAX_TOKEN_BYTES, Prompt, check_text_size, fit_max_tokens
from server.http.errors import BadRequestError, ContextLengthExceededError, UnknownParameterError
from server.metrics import Metrics
from server.text.choice_text import ChoiceText
from server.text.tokenizer import Tokenizer
from tests.support.deltas import content

EOS = 256
NO_LOGPROBS = TokenLogprobs(-1.0, 1, [], [])


def make_choice(
    tokenizer: Tokenizer, *, index: int = 0, stop: list[str] | None = None, include_stop: bool = False
) -> ChoiceState:
    text = ChoiceText(tokenizer, stop=stop or (), include_stop=include_stop, track_offsets=True)
    return ChoiceState(index, text, include_stop=include_stop)


def run(choice: ChoiceState, batches: list[list[int]], end: FinishReason, stop_token_id: int | None) -> list[Delta]:
    """The deltas of a choice whose tokens come in these batches; the last one ends it."""
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
def test_a_choice_is_the_same_however_its_tokens_come(
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
    # Against the plain reading of the bytes.
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


class Events:
    """What a `RequestStream` is to a `Generation`."""

    def __init__(self, batches: list[list[TokenEvent]]) -> None:
        self._batches = batches
        self.choices = [SimpleNamespace(times=None)] * 9

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        for batch in self._batches:
            yield batch

    def close(self) -> None:
        pass


@pytest.mark.anyio
async def test_events_of_a_choice_that_come_together_are_one_addition(tokenizer: Tokenizer) -> None:
    def event(index: int, text: str, finish_reason: FinishReason | None = None) -> TokenEvent:
        logprobs = [NO_LOGPROBS] * len(text)
        token_ids = list(text.encode())
        return TokenEvent(
            request_id="r", index=index, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason
        )

    batches = [[event(0, "a")], [event(0, "b"), event(1, "x"), event(0, "cd", FinishReason.LENGTH), event(1, "y")]]
    choices = [make_choice(tokenizer, index=index) for index in range(2)]
    streams: Any = [Events(batches)]
    generation = Generation([Prompt([1])], streams, choices, metrics=Metrics("", "m"), request_id="r", submitted=0.0)
    found = [
        [(delta.index, delta.text, len(delta.positions), delta.finish_reason) for delta in deltas]
        async for deltas in generation.deltas()
    ]
    assert found == [[(0, "a", 1, None)], [(0, "bcd", 3, "length"), (1, "xy", 2, None)]]


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
    assert choice.push(event) == Delta(0, [content("a")], [], "stop", stop_string="b", token_ids=[*b"ab"])
    assert choice.num_tokens == 2


# Log probabilities.


@pytest.mark.parametrize(("value", "expected"), [(-0.5, -0.5), (-math.inf, -9999.0), (-12345.0, -9999.0), (0.0, 0.0)])
def test_log_probabilities_are_json(value: float, expected: float) -> None:
    assert json_logprob(value) == expected


def test_minus_infinity_in_an_answer(tokenizer: Tokenizer) -> None:
    choice = make_choice(tokenizer)
    logprobs = TokenLogprobs(-math.inf, 7, [66, 67], [-0.1, -math.inf])
    event = TokenEvent(
        request_id="r", token_ids=[65], logprobs=[logprobs], finish_reason=FinishReason.LENGTH, stop_token_id=None
    )
    writer = CompletionWriter(tokenizer, Head("cmpl-1", 1, "m", "fp"), None, with_logprobs=True)
    chunk = msgspec.to_builtins(writer.chunks(choice.push(event))[0])
    assert chunk["choices"][0]["logprobs"] == {
        "text_offset": [0],
        "token_logprobs": [-9999.0],
        "tokens": ["A"],
        "top_logprobs": [{"B": -0.1, "C": -9999.0, "A": -9999.0}],
    }


# The best of several.


def whole(index: int, *logprobs: float) -> Delta:
    positions = [Position(65, TokenLogprobs(logprob, 1, [], []), 0) for logprob in logprobs]
    return Delta(index, [content(f"text {index}")], positions)


def test_best_choices_have_the_highest_mean() -> None:
    """Of each prompt, best first; of equal ones the first."""
    wholes = [whole(0, -3.0), whole(1, -1.0, -2.0), whole(2, -1.0), whole(3, -9.0), whole(4), whole(5, -9.0, -9.0)]
    best = best_choices(wholes, 3, 2)
    assert [(delta.index, delta.text) for delta in best] == [
        (0, "text 2"),
        (1, "text 1"),
        (2, "text 3"),
        (3, "text 5"),
    ]
    assert best_choices(wholes, 3, 3) is wholes


# Events.


def test_events_have_no_line_ends_of_any_kind(tokenizer: Tokenizer) -> None:
    writer = CompletionWriter(tokenizer, Head("cmpl-1", 1, "m", "fp"), None, with_logprobs=False)
    text = "a\u2028b\u2029c\x85d\ne\r\nf\x0b\x0c\x1c\x1d\x1e\0"
    events = frame_chunks(writer.chunks(Delta(0, [content(text)])))
    (line,) = [line for line in events.decode().splitlines() if line]
    assert line.startswith("data: ")
    assert events.endswith(b"}\n\n")
    assert msgspec.json.decode(line.removeprefix("data: "))["choices"][0]["text"] == text


# Parameters.


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}]} | fields)


def test_known_parameters_have_one_meaning() -> None:
    assert not set(UNSUPPORTED) & HARMLESS
    assert not HARMLESS & (set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields))


def test_every_parameter_of_the_official_client_is_known() -> None:
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_params

    known = set(UNSUPPORTED) | HARMLESS | {"verbosity"}  # no more than advice, which is ignored and named
    chat_names = set(chat_params.CompletionCreateParamsBase.__annotations__)
    assert chat_names <= known | set(ChatCompletionRequest.model_fields)
    names = set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert names <= known | set(CompletionRequest.model_fields)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_defaults_of_unsupported_parameters_pass(name: str) -> None:
    for value in (None, *UNSUPPORTED[name]):
        if name not in ChatCompletionRequest.model_fields:
            assert unknown_parameters(chat(**{name: value}), strict=True) == []


@pytest.mark.parametrize(
    ("name", "value"), [("use_beam_search", 0), ("smoothing_factor", False), ("functions", {}), ("best_of", True)]
)
def test_values_that_only_look_like_a_default(name: str, value: object) -> None:
    with pytest.raises(BadRequestError):
        unknown_parameters(chat(**{name: value}), strict=False)


def test_unknown_names_in_strict_mode_are_bounded() -> None:
    with pytest.raises(UnknownParameterError) as caught:
        unknown_parameters(chat(**{"x" * 10_000: 1}), strict=True)
    assert len(caught.value.message) < 300


@given(st.lists(st.text(max_size=100), min_size=1, max_size=100))
def test_warnings_are_one_line_of_bounded_length(names: list[str]) -> None:
    header = warnings_header(names)
    assert header.isascii()
    assert header.isprintable()
    assert len(header) <= MAX_WARNINGS_CHARS + 10


# Seeds.


def test_seeds() -> None:
    drawn = {choose_seed(None, 0) for _ in range(100)}
    assert len(drawn) == 100
    assert min(drawn) < 0 < max(drawn)  # all 64 bits
    derived = [choose_seed(7, number) for number in range(100)]
    assert derived == [choose_seed(7, number) for number in range(100)]
    of_prompts = [prompt_seed(7, index) for index in range(100)]
    assert of_prompts[0] == 7
    assert len({*derived, *of_prompts}) == 200
    rng = random.Random(0)
    for _ in range(100):
        assert -(2**63) <= prompt_seed(rng.randrange(-(2**63), 2**63), rng.randrange(1024)) < 2**63


# Length.


@given(
    max_tokens=st.none() | st.integers(0, 30), num_prompt_tokens=st.integers(1, 30), max_model_len=st.integers(1, 20)
)
def test_what_fits_is_never_changed(max_tokens: int | None, num_prompt_tokens: int, max_model_len: int) -> None:
    fits = num_prompt_tokens + (1 if max_tokens is None else max_tokens) <= max_model_len
    if not fits:
        with pytest.raises(ContextLengthExceededError) as caught:
            fit_max_tokens(max_tokens, num_prompt_tokens, max_model_len, "prompt")
        assert str(num_prompt_tokens) in caught.value.message
        assert str(max_model_len) in caught.value.message
        return
    fitted = fit_max_tokens(max_tokens, num_prompt_tokens, max_model_len, "prompt")
    assert fitted == (max_model_len - num_prompt_tokens if max_tokens is None else max_tokens)


def test_cap_of_a_texts_size() -> None:
    check_text_size(8 * MAX_TOKEN_BYTES, 8, "prompt")
    with pytest.raises(BadRequestError) as caught:
        check_text_size(8 * MAX_TOKEN_BYTES + 1, 8, "prompt")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
