"""Timings of requests: the stages leave no gap, whichever times the engine reports."""

import time

import msgspec
import pytest

from engine.shared.records import RequestTimes
from server.generation.timings import ChoiceEnd, request_timings
from server.schemas.answers import RequestTimings

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


def compute(times: RequestTimes | None, monkeypatch: pytest.MonkeyPatch, received: float = 118.0) -> RequestTimings:
    monkeypatch.setattr(time, "monotonic", lambda: 125.0)
    ending = ChoiceEnd(times, num_output_tokens=8, received=received, detokenized=received + 0.25)
    return request_timings(ending, arrival=100.0, submitted=101.0, seed=-5)


def check_sum(computed: RequestTimings) -> None:
    assert sum(msgspec.structs.astuple(computed.seconds)) == pytest.approx(computed.wall_s)
    assert all(seconds >= 0 for seconds in msgspec.structs.astuple(computed.seconds))


def test_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = compute(TIMES, monkeypatch)
    assert msgspec.to_builtins(computed) == {
        "seed": -5,
        "wall_s": 25.0,
        "seconds": {
            "tokenizing": 1.0,
            "queue": 2.0,
            "prefill": 3.0,
            "decode": 7.5,
            "preempted": 3.5,
            "detokenizing": 0.25,
            "writing": 7.75,
        },
        "num_ahead": 4,
        "num_cached_tokens": 32,
        "num_computed_tokens": 18,
        "num_chunks": 3,
        "num_output_tokens": 8,
        "num_preemptions": 2,
    }
    check_sum(computed)


def test_an_end_that_the_engine_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server finds a stop string, the choice ends when its last token is received."""
    computed = compute(msgspec.structs.replace(TIMES, finished=None), monkeypatch)
    assert (computed.seconds.decode, computed.seconds.writing) == (8.5, 6.75)
    check_sum(computed)


def test_a_request_that_is_only_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = compute(
        msgspec.structs.replace(TIMES, first_token=None, preemptions=(105.0,), resumptions=(106.0,)), monkeypatch
    )
    assert (computed.seconds.prefill, computed.seconds.decode) == (13.0, 0.0)
    check_sum(computed)


def test_a_request_that_ended_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = compute(None, monkeypatch)
    assert (computed.seconds.queue, computed.seconds.prefill, computed.seconds.decode) == (17.0, 0.0, 0.0)
    check_sum(computed)
