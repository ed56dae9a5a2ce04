"""Computes how long each stage of a request took. The stages follow one another without a gap."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.shared.records import RequestTimes
from server.schemas.answers import RequestTimings, StageSeconds


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The end of the choice that ended last. Times are `time.monotonic()`."""

    times: RequestTimes | None  # from the engine; without `finished` if the server found a stop string
    num_output_tokens: int
    received: float  # when the last event arrived
    detokenized: float  # when its text was ready


def request_timings(end: ChoiceEnd, *, arrival: float, submitted: float, seed: int) -> RequestTimings:
    """Return the timings of a request whose answer is complete except for them.

    `arrival` and `submitted` are `time.monotonic()` of when the request arrived and was sent to the engine.
    """
    now = time.monotonic()
    times = end.times or RequestTimes(arrival=arrival, queued=submitted)
    finished = times.finished or end.received
    scheduled = times.scheduled or finished
    first_token = times.first_token or finished
    preempted_before, preempted_after = times.preempted_before_first_token, times.preempted_after_first_token
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
