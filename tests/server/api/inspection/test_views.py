"""Stages of a request add up, whatever has happened to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.record import RequestRecord
from server.api.inspection.views import stages

DURATION = st.floats(0, 100)


def is_running(record: RequestRecord) -> bool:
    return len(record.preemptions) == len(record.resumptions)


@given(durations=st.lists(DURATION, min_size=1, max_size=12), has_first_token=st.integers(0, 12), ended=st.booleans())
def test_stages_add_up(durations: list[float], has_first_token: int, ended: bool) -> None:
    """A choice is queued, scheduled, and then preempted and resumed in turn; at some point it has its first token."""
    times = [1.0]
    for duration in durations:
        times.append(times[-1] + duration)
    record = RequestRecord("r-0", 0, arrival=1.0, queued=times[1], num_prompt_tokens=5)
    now = times[-1]
    for number, moment in enumerate(times[2:]):
        if number == 0:
            record.scheduled = moment
        elif number >= has_first_token and record.first_token is None and is_running(record):
            record.first_token = moment
        elif is_running(record):
            record.preemptions.append(moment)
        else:
            record.resumptions.append(moment)
    if ended:
        record.finished = now
    seconds = stages(record.times(), now)
    parts = (seconds.tokenizing, seconds.queue, seconds.prefill, seconds.decode, seconds.preempted)
    assert sum(parts) == pytest.approx(now - record.arrival)
    assert min(parts) >= -1e-9
    if not ended and record.preemptions and not is_running(record):
        assert seconds.preempted >= now - record.preemptions[-1] - 1e-9
