"""What a request's time went to: parts without a gap, whatever the engine knows."""

import time

import msgspec
import pytest

from engine.shared.messages import RequestTimes
from server.generation.timings import Ending, account_of
from server.schemas.common import Account

TIMES = RequestTimes(
    arrival=100.0,
    queued=101.5,
    scheduled=103.0,
    first_token=107.0,
    finished=117.0,
    num_prompt_tokens=50,
    num_cached_tokens=32,
    num_output_tokens=9,
    num_preemptions=2,
    num_chunks=3,
    num_ahead=4,
    preempted_before_first_token=1.0,
    preempted_after_first_token=2.5,
)


def account(times: RequestTimes | None, monkeypatch: pytest.MonkeyPatch, received: float = 118.0) -> Account:
    monkeypatch.setattr(time, "monotonic", lambda: 125.0)
    ending = Ending(times, num_output_tokens=8, received=received, detokenized=received + 0.25)
    return account_of(ending, arrival=100.0, submitted=101.0, seed=-5)


def check_sum(found: Account) -> None:
    assert sum(msgspec.structs.astuple(found.seconds)) == pytest.approx(found.wall_s)
    assert all(seconds >= 0 for seconds in msgspec.structs.astuple(found.seconds))


def test_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = account(TIMES, monkeypatch)
    assert msgspec.to_builtins(found) == {
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
    check_sum(found)


def test_an_end_that_the_engine_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string was found: the last token is when it came here."""
    found = account(msgspec.structs.replace(TIMES, finished=None), monkeypatch)
    assert (found.seconds.decode, found.seconds.writing) == (8.5, 6.75)
    check_sum(found)


def test_a_request_that_is_only_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = account(msgspec.structs.replace(TIMES, first_token=None, preempted_after_first_token=0.0), monkeypatch)
    assert (found.seconds.prefill, found.seconds.decode) == (13.0, 0.0)
    check_sum(found)


def test_a_request_that_ended_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    found = account(None, monkeypatch)
    assert (found.seconds.queue, found.seconds.prefill, found.seconds.decode) == (17.0, 0.0, 0.0)
    check_sum(found)
