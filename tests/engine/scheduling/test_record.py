"""The number of records is bounded, and the timings of a request are those of its record."""

import pytest

from engine.scheduling.record import Recorder, RequestRecord, RowRecord, StepClock, StepRecord


def request_record(index: int = 0) -> RequestRecord:
    return RequestRecord("r", index, arrival=1.0, queued=2.0, num_prompt_tokens=5)


def step_record(step_id: int = 1) -> StepRecord:
    rows = [
        RowRecord(request_record(), 0, 7, is_prompt=True, num_generated=0, num_drafts=0, num_accepted=0),
        RowRecord(request_record(1), 9, 1, is_prompt=False, num_generated=1, num_drafts=0, num_accepted=0),
    ]
    return StepRecord(step_id, 1.0, rows, num_running=2, num_waiting=3, num_blocks_used=4)


def test_the_recorder_keeps_the_last_steps_and_requests() -> None:
    recorder = Recorder(num_steps=3, num_requests=2)
    for number in range(5):
        recorder.add_step(step_record(number))
        recorder.add_request(request_record(number))
    assert [record.step_id for record in recorder.steps] == [2, 3, 4]
    assert [record.index for record in recorder.requests] == [3, 4]


def test_the_oldest_steps_are_dropped_when_there_are_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.scheduling.record.MAX_ROWS_KEPT", 7)
    recorder = Recorder(num_steps=100)

    def kept() -> tuple[list[int], int, int]:
        return [record.step_id for record in recorder.steps], recorder.num_rows, recorder.last_dropped

    for number in range(1, 6):
        recorder.add_step(step_record(number))  # of two rows each
    assert kept() == ([3, 4, 5], 6, 2)
    large = step_record(6)
    large.rows *= 5
    recorder.add_step(large)
    assert kept() == ([6], 10, 5)
    recorder.add_step(step_record(7))
    assert kept() == ([7], 2, 6)


def test_timings_of_a_request() -> None:
    record, names = request_record(), ["arrival", "queued", "scheduled", "first_token", "finished"]
    names += [f"num_{part}" for part in ("prompt_tokens", "cached_tokens", "output_tokens", "ahead", "accepted_tokens")]
    for number, name in enumerate(names, 1):
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


def test_token_ids_are_kept_only_if_asked_for_and_only_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.scheduling.record.MAX_KEPT_BYTES", 40)
    without, recorder = Recorder(), Recorder(num_requests=4, keeps_tokens=True)
    records = [request_record(number) for number in range(5)]
    for number, record in enumerate(records):
        without.add_request(request_record(number), [1, 2, 3, 4])
        recorder.add_request(record, [number] * 4)
        assert recorder.num_kept_bytes <= 40
    assert {record.token_ids for record in without.requests} == {None}
    kept = [None if record.token_ids is None else record.token_ids.tolist() for record in records]
    assert kept == [None, None, None, [3] * 4, [4] * 4]
    for number in range(5, 10):
        recorder.add_request(request_record(number), [])
    assert recorder.num_kept_bytes == 0
    assert records[4].token_ids is None  # rows of steps may still hold the record
