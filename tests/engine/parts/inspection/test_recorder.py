"""The number of records is bounded."""

import pytest

from engine.parts.inspection.recorder import Recorder, notes_of
from engine.scheduling.request import Request
from tests.engine.scheduling.test_scheduler import Rig
from tests.support.records import example_step
from tests.support.submits import request_for


def ended(index: int = 0, output: int = 0) -> Request:
    """Return a request with a prompt of four tokens."""
    return request_for([output] * 4, number=index)


def test_the_oldest_steps_are_dropped_when_there_are_too_many_or_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parts.inspection.recorder.MAX_ROWS_KEPT", 7)
    recorder = Recorder(Rig().scheduler, num_steps=4)

    def kept() -> tuple[list[int], int, int]:
        return [step.id for step in recorder.steps], recorder.num_rows, recorder.last_dropped

    for number in range(1, 6):
        recorder.keep_step(example_step(number, ("a", "b")))
    assert kept() == ([3, 4, 5], 6, 2)
    recorder.keep_step(example_step(6, 5 * ("a", "b")))
    assert kept() == ([6], 10, 5)
    recorder.keep_step(example_step(7, ("a", "b")))
    assert kept() == ([7], 2, 6)
    for number in range(8, 12):
        recorder.keep_step(example_step(number))
    assert kept()[0] == [8, 9, 10, 11]


def test_token_ids_are_kept_only_if_asked_for_and_only_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parts.inspection.recorder.MAX_KEPT_BYTES", 40)
    monkeypatch.setattr("engine.parts.inspection.recorder.PARAMETER_BYTES", 0)
    without, recorder = Recorder(Rig().scheduler), Recorder(Rig().scheduler, num_requests=4, keeps_tokens=True)
    requests = [ended(number, number) for number in range(10)]
    for number, request in enumerate(requests[:5]):
        without.add_request(ended(number))
        recorder.add_request(request)
        assert recorder.num_kept_bytes <= 40
    assert {notes_of(record).token_ids for record in without.requests} == {None}
    kept = [notes_of(request.record).token_ids for request in requests[:5]]
    assert [ids and ids.tolist() for ids in kept] == [None, None, None, [3] * 4, [4] * 4]
    for request in requests[5:]:
        request.token_ids = []
        recorder.add_request(request)
    assert recorder.num_kept_bytes == 0
    assert list(recorder.requests) == [request.record for request in requests[-4:]]


def test_the_hashes_of_overwritten_blocks_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parts.inspection.recorder.MAX_EVICTED", 3)
    recorder = Recorder(Rig(num_blocks=2, max_model_len=8).scheduler)
    pool, hashes = recorder.scheduler.pool, [bytes([number]) * 32 for number in range(8)]
    for number, block_hash in enumerate(hashes):
        blocks = pool.allocate(1) or []
        pool.publish(blocks[0], block_hash)
        pool.release(blocks)
        overwritten = hashes[: max(0, number - 1)]  # blocks never used are handed out first
        assert list(recorder.evicted) == overwritten[-3:]
