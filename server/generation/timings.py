"""What a request's time went to: parts that follow on each other from its arrival to now, without a gap."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.shared.messages import RequestTimes
from server.schemas.common import Account, AccountSeconds


@dataclass(frozen=True, slots=True)
class Ending:
    """How the choice ended that ended last. Times are of `time.monotonic()`."""

    times: RequestTimes | None  # the engine's, which do not know the end if a stop string was found here
    num_output_tokens: int
    received: float  # when its last event came
    detokenized: float  # when that was text


def account_of(ending: Ending, *, arrival: float, submitted: float, seed: int) -> Account:
    """The account of a request that has been answered but for the account itself."""
    now = time.monotonic()
    times = ending.times or RequestTimes(arrival=arrival, queued=submitted)
    finished = times.finished or ending.received
    scheduled = times.scheduled or finished
    first_token = times.first_token or finished
    waited_before, waited_after = times.preempted_before_first_token, times.preempted_after_first_token
    return Account(
        seed=seed,
        wall_s=now - arrival,
        seconds=AccountSeconds(
            tokenizing=submitted - arrival,
            queue=scheduled - submitted,
            prefill=first_token - scheduled - waited_before,
            decode=finished - first_token - waited_after,
            preempted=waited_before + waited_after,
            detokenizing=ending.detokenized - ending.received,
            writing=(ending.received - finished) + (now - ending.detokenized),
        ),
        num_ahead=times.num_ahead,
        num_cached_tokens=times.num_cached_tokens,
        num_computed_tokens=times.num_prompt_tokens - times.num_cached_tokens,
        num_chunks=times.num_chunks,
        num_output_tokens=ending.num_output_tokens,
        num_preemptions=times.num_preemptions,
    )
