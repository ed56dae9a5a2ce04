"""Log probabilities as JSON numbers, the joining of deltas, and the selection of the best choices."""

import math
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.api.completions.writer import CompletionWriter
from server.generation.choice_delta import (
    ChoiceDelta,
    TokenPosition,
    ToolCallDelta,
    best_choices,
    join_deltas,
    json_logprob,
)
from server.generation.endpoint import AnswerMetadata
from server.generation.event_writer import encode_chunks
from server.generation.generation import Generation
from server.generation.prompts import Prompt
from server.http.strict_json import MAX_DEPTH
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from tests.support.deltas import NO_LOGPROBS, content, delta, make_choice
from tests.support.growth import check_growth


@pytest.mark.checklist("D11")
@pytest.mark.parametrize(("value", "expected"), [(-0.5, -0.5), (-math.inf, -9999.0), (-12345.0, -9999.0), (0.0, 0.0)])
def test_log_probabilities_are_json(value: float, expected: float) -> None:
    assert json_logprob(value) == expected


def whole(index: int, *logprobs: float) -> ChoiceDelta:
    positions = [TokenPosition(65, TokenLogprobs.pack(logprob, 1, [], []), 0) for logprob in logprobs]
    return ChoiceDelta(index, [content(f"text {index}")], positions)


def test_best_choices_have_the_highest_mean() -> None:
    """They are selected per prompt and sorted best first; ties keep their order."""
    wholes = [whole(0, -3.0), whole(1, -1.0, -2.0), whole(2, -1.0), whole(3, -9.0), whole(4), whole(5, -9.0, -9.0)]
    best = best_choices(wholes, 3, 2)
    assert [(delta.index, delta.text) for delta in best] == [(0, "text 2"), (1, "text 1"), (2, "text 3"), (3, "text 5")]
    assert best_choices(wholes, 3, 3) is wholes


@pytest.mark.checklist("C24")
def test_many_deltas_are_joined_in_linear_time() -> None:
    """As when a client has not read its stream for a while."""

    def prepare(size: int) -> Callable[[], object]:
        deltas = [delta(content("x" * 100)) for _ in range(size)]
        return lambda: join_deltas(deltas)

    check_growth(prepare, 4000)


@pytest.mark.parametrize("depth", [1, 98, 99, 995, 100_000])
def test_arguments_that_are_nested_too_deep_are_text(depth: int) -> None:
    text = '{"a": ' + "[" * depth + "]" * depth + "}"
    arguments = ToolCallDelta(0, "id", "name", text).decoded_arguments
    assert msgspec.json.encode(arguments)
    assert (arguments == {"arguments": text}) == (depth >= MAX_DEPTH)


# Encoding of server-sent events.


@pytest.mark.checklist("D05")
def test_events_have_no_line_ends_of_any_kind(tokenizer: Tokenizer) -> None:
    writer = CompletionWriter(tokenizer, AnswerMetadata("cmpl-1", 1, "m", "fp"), None, with_logprobs=False)
    text = "a\u2028b\u2029c\x85d\ne\r\nf\x0b\x0c\x1c\x1d\x1e\0"
    events = encode_chunks(writer.chunks(ChoiceDelta(0, [content(text)])))
    (line,) = [line for line in events.decode().splitlines() if line]
    assert line.startswith("data: ")
    assert events.endswith(b"}\n\n")
    assert msgspec.json.decode(line.removeprefix("data: "))["choices"][0]["text"] == text


# Merging of the events of a request's streams into deltas.


class Events:
    """Implements the part of `RequestStream` that `Generation` uses."""

    def __init__(self, batches: list[list[TokenEvent]]) -> None:
        self._batches = batches
        self.choices = [SimpleNamespace(times=None)] * 9

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        for batch in self._batches:
            yield batch

    def close(self) -> None:
        pass


@pytest.mark.anyio
async def test_events_of_a_choice_in_one_batch_become_one_delta(tokenizer: Tokenizer) -> None:
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
