"""Computes how long each stage of a request took. The stages follow one another without a gap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from engine.shared.records import RequestTimes
from server.schemas.answers import RequestTimings, StageSeconds


class Stage(NamedTuple):
    """A part of a choice's time, from and to times of `time.monotonic()`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The end of the choice that ended last. Times are `time.monotonic()`."""

    times: RequestTimes | None  # from the engine; without `finished` if the server found a stop string
    num_output_tokens: int
    received: float  # when the last event arrived
    detokenized: float  # when its text was ready


def request_timings(end: ChoiceEnd, *, arrival: float, submitted: float, seed: int, now: float) -> RequestTimings:
    """Return the timings of a request whose answer is complete except for them.

    `arrival`, `submitted` and `now` are `time.monotonic()`: it arrived, was sent to the engine, and is answered.
    """
    times = end.times or RequestTimes(arrival=arrival, queued=submitted)
    finished = times.finished or end.received
    scheduled = times.scheduled or finished
    first_token = times.first_token or finished
    preempted_before, preempted_after = times.preempted(finished)
    return RequestTimings(
        seed=seed,
        wall_s=now - arrival,
        seconds=StageSeconds(
            tokenizing=submitted - arrival,
            queue=scheduled - submitted,
            prefill=first_token - scheduled - preempted_before,
            decode=finished - first_token - preempted_after,
            preempted=preempted_before + preempted_after,
            detokenizing=end.detokenized - end.received,
            writing=(end.received - finished) + (now - end.detokenized),
        ),
        num_ahead=times.num_ahead,
        num_cached_tokens=times.num_cached_tokens,
        num_computed_tokens=times.num_prompt_tokens - times.num_cached_tokens,
        num_chunks=times.num_chunks,
        num_output_tokens=end.num_output_tokens,
        num_preemptions=times.num_preemptions,
    )


def stage_spans(times: RequestTimes, now: float) -> list[Stage]:
    """Return the stages of a choice until `now`, or until its end. Each starts where the one before ends.

    Their names are the fields of `Stages`. Stages after a preemption come again.
    """
    end = now if times.finished is None else times.finished
    start = end if times.scheduled is None else times.scheduled
    spans = [Stage("tokenizing", times.arrival, times.queued), Stage("queue", times.queued, start)]
    for preempted, resumed in zip_longest(times.preemptions, times.resumptions, fillvalue=end):
        spans += [*_computing(start, preempted, times.first_token), Stage("preempted", preempted, resumed)]
        start = resumed
    return [*spans, *_computing(start, end, times.first_token)]


def _computing(start: float, end: float, first_token: float | None) -> list[Stage]:
    """Return the stages between two times in which a choice was not preempted."""
    middle = end if first_token is None else min(max(start, first_token), end)
    return [Stage("prefill", start, middle), Stage("decode", middle, end)]
