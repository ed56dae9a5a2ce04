"""Timings of requests: the stages leave no gap, whichever times the engine reports."""

from typing import Any

import msgspec
import pytest

from engine.shared.records import RequestTimes
from server.generation.timings import ChoiceEnd, request_timings

TIMES = RequestTimes(
    arrival=100.0,
    queued=101.5,
    scheduled=103.0,
    first_token=107.0,
    finished=117.0,
    num_prompt_tokens=50,
    num_cached_tokens=32,
    num_output_tokens=9,
    preemptions=(105.0, 109.0),
    resumptions=(106.0, 111.5),
    num_chunks=3,
    num_ahead=4,
)


@pytest.mark.parametrize(
    ("changes", "prefill", "decode", "preempted", "writing"),
    [
        ({}, 3.0, 7.5, 3.5, 7.75),
        ({"finished": None}, 3.0, 8.5, 3.5, 6.75),  # a stop string, which the server finds
        # A request that is only a prompt.
        ({"first_token": None, "preemptions": (105.0,), "resumptions": (106.0,)}, 13.0, 0.0, 1.0, 7.75),
    ],
)
def test_stages(changes: dict[str, Any], prefill: float, decode: float, preempted: float, writing: float) -> None:
    times = msgspec.structs.replace(TIMES, **changes)
    ending = ChoiceEnd(times, num_output_tokens=8, received=118.0, detokenized=118.25)
    computed = request_timings(ending, arrival=100.0, submitted=101.0, seed=-5, now=125.0)
    assert msgspec.structs.astuple(computed.seconds) == (1.0, 2.0, prefill, decode, preempted, 0.25, writing)
    assert sum(msgspec.structs.astuple(computed.seconds)) == pytest.approx(25.0)
    num_preemptions = len(changes.get("preemptions", TIMES.preemptions))
    counts = {
        "num_ahead": 4,
        "num_cached_tokens": 32,
        "num_computed_tokens": 18,
        "num_chunks": 3,
        "num_output_tokens": 8,
    }
    expected = {"seed": -5, "wall_s": 25.0, "num_preemptions": num_preemptions, **counts}
    assert expected.items() <= msgspec.to_builtins(computed).items()


def test_a_request_that_ended_in_the_queue() -> None:
    ending = ChoiceEnd(None, num_output_tokens=0, received=118.0, detokenized=118.0)
    seconds = request_timings(ending, arrival=100.0, submitted=101.0, seed=-5, now=125.0).seconds
    assert msgspec.structs.astuple(seconds) == (1.0, 17.0, 0.0, 0.0, 0.0, 0.0, 7.0)
