"""The timings of a request are those of its record."""

from engine.scheduling.record import RequestRecord, StepClock
from tests.support.submits import new_submit


def test_timings_of_a_request() -> None:
    record = RequestRecord(submit=new_submit(), index=0, arrival=1, queued=2.0, num_prompt_tokens=5)
    names = ["arrival", "queued", "scheduled", "first_token", "finished"]
    names += [f"num_{part}" for part in ("prompt_tokens", "cached_tokens", "output_tokens", "ahead", "accepted_tokens")]
    for number, name in enumerate(names[1:], 2):
        setattr(record, name, number)
    record.preemptions += [3.25, 4.25, 4.75]
    record.resumptions += [3.75, 4.5]  # it ended while preempted
    times = record.times()
    assert [getattr(times, name) for name in names] == list(range(1, 11))
    assert times.preempted(5.0) == (0.5, 0.5)


def test_the_parts_of_a_step_add_up() -> None:
    clock = StepClock(iter([10.0, 10.5, 12.5, 13.0]).__next__)
    for part in ("schedule", "forward", "schedule"):
        clock.lap(part)
    assert clock.started == 10.0
    assert clock.seconds == {"schedule": 1.0, "forward": 2.0}
