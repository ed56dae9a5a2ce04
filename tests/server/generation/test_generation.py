"""Merging of the events of a request's streams into deltas."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.shared.messages import FinishReason, TokenEvent
from server.generation.generation import Generation
from server.generation.prompts import Prompt
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from tests.support.deltas import NO_LOGPROBS, make_choice


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
