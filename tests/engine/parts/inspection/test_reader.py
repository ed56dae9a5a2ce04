"""Questions about the records of a scheduler that runs a fake model, with blocks of four tokens."""

from array import array
from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.parts.inspection.prefix import PART, num_common
from engine.parts.inspection.reader import MAX_ROWS, RecordReader
from engine.parts.inspection.recorder import Recorder, notes_of
from engine.parts.inspection.records import PrefixResult, ReadQueue, ReadRequests, ReadSteps
from engine.scheduling.request import Request
from tests.engine.scheduling.test_scheduler import Rig, prompt
from tests.support.records import example_step


def received(answer: object) -> Any:
    """Return an answer as the other process gets it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=type(answer))


class Reading:
    """A reader of a rig's records."""

    def __init__(self, *, keeps_tokens: bool = True, caches_prefixes: bool = True, **limits: Any) -> None:
        self.rig = Rig(**limits)
        self.recorder = Recorder(self.rig.scheduler, keeps_tokens=keeps_tokens)
        self.reader = RecordReader(self.recorder, caches_prefixes=caches_prefixes)

    def add(self, token_ids: range | list[int], id: str = "", **fields: Any) -> Request:
        now = float(self.rig.num_submitted)
        name = id or f"r{self.rig.num_submitted}"
        fields = {"request_id": f"{name}-0", "ids": (name, "same"), "max_tokens": 2} | fields
        return self.rig.add(token_ids, now=now, arrival=now, **fields)

    def complete(self, token_ids: range | list[int], id: str = "", **fields: Any) -> None:
        """Add a request, and run until all have ended."""
        self.add(token_ids, id, **fields)
        self.rig.run()

    def ask(self, kind: Any, **fields: Any) -> Any:
        return received(self.reader.answer(kind(**fields)))

    def steps(self, after: int | None = None, **fields: Any) -> Any:
        return self.ask(ReadSteps, after=after, **{"limit": 100} | fields)

    def requests(self, **filters: Any) -> Any:
        return self.ask(ReadRequests, **{"limit": 100} | filters)

    def views(self, **filters: Any) -> Any:
        return [info.view for info in self.requests(**filters).requests]

    def queue(self, limit: int = 100) -> Any:
        return self.ask(ReadQueue, limit=limit)

    def one(self, id: str, **filters: Any) -> Any:
        (info,) = self.requests(id=id, **filters).requests
        return info.view

    def record_step(self, step_id: int, num_rows: int = 1) -> None:
        self.recorder.keep_step(example_step(step_id, ("t",) * num_rows, started=float(step_id)))


def test_steps() -> None:
    """After one or since a time, with how many a reader has missed, and whether there are more."""
    reading = Reading()
    reading.recorder.steps = deque(maxlen=5)

    def found(limit: int = 100, **question: Any) -> tuple[list[int], int, bool]:
        steps = reading.steps(limit=limit, **question)
        return [step.id for step in steps.data], steps.num_lost, steps.has_more

    assert found() == found(after=0) == ([], 0, False)
    for step_id in (1, 2, 4):  # 3 has failed
        reading.record_step(step_id)
    for after, expected in ((0, [1, 2, 4]), (1, [2, 4]), (2, [4]), (3, [4]), (4, []), (99, [])):
        assert found(after=after) == (expected, 0, False)
    assert found(after=0, limit=2) == ([1, 2], 0, True)
    assert found(limit=2)[0] == [2, 4]
    for step_id in range(5, 9):
        reading.record_step(step_id)
    assert [found(after=after) for after in (0, 1, 2)] == [([4, 5, 6, 7, 8], lost, False) for lost in (2, 1, 0)]
    assert found(after=4) == ([5, 6, 7, 8], 0, False)
    assert found(since=2.0) == ([4, 5, 6, 7, 8], 2, False)  # the first two are no longer recorded
    assert found(since=5.0) == ([5, 6, 7, 8], 0, False)
    assert found(since=5.5, limit=1) == ([6], 0, True)
    assert found(since=5.5, limit=1, after=6) == ([7], 0, True)
    assert found(since=9.0) == ([], 0, False)


def test_an_answer_has_a_bounded_number_of_rows_but_at_least_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading()
    reading.record_step(1, num_rows=MAX_ROWS + 1)
    for step_id in (2, 3, 4):
        reading.record_step(step_id, num_rows=MAX_ROWS // 2)
    for after, step_ids, has_more in ((0, [1], True), (1, [2, 3], True), (3, [4], False), (None, [3, 4], False)):
        steps = reading.steps(after=after)
        assert ([step.id for step in steps.data], steps.has_more) == (step_ids, has_more)
    assert reading.steps(after=3).data == [example_step(4, ("t",) * (MAX_ROWS // 2), started=4.0)]
    # Steps that are dropped for their rows are missed too.
    monkeypatch.setattr("engine.parts.inspection.recorder.MAX_ROWS_KEPT", MAX_ROWS)
    reading.record_step(5)
    found = [reading.steps(after) for after in (0, 3, 4)]
    assert [(steps.data[0].id, steps.num_lost) for steps in found] == [(4, 3), (4, 0), (5, 0)]


def test_requests_that_had_not_ended_before_a_time() -> None:
    reading = Reading(max_num_seqs=2)
    for number in range(3):
        reading.complete(prompt(9), f"r{number}")
        reading.recorder.requests[-1].finished = float(number)
    reading.add(prompt(9), "living")
    reading.rig.step()
    found = reading.views(since=1.0)
    assert [view.id for view in found] == ["living", "r2", "r1"]
    for view in found:
        assert [chunk.position for chunk in view.chunks] == [view.num_cached_tokens]
    assert reading.views(since=0.0)[-1].prefix.result is PrefixResult.NOT_FOUND  # not compared with others
    assert reading.views()[0].chunks == []


def test_requests_the_living_before_the_ended_and_the_latest_first() -> None:
    reading = Reading(max_num_seqs=1)
    for number in range(4):
        tenant = ("even", "odd")[number % 2]
        reading.add(prompt(3, 100 * number), tenant=tenant, lora_name="lora"[: number * 4])
    while len(reading.recorder.requests) < 2:
        reading.rig.step()
    reading.rig.step()
    assert [view.id for view in reading.views()] == ["r3", "r2", "r1", "r0"]
    assert [view.state for view in reading.views()] == ["waiting", "running", "finished", "finished"]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"state": "running"}, ["r2"]),
        ({"tenant": "odd", "state": "finished"}, ["r1"]),
        ({"tenant": "nobody"}, []),
        ({"lora_name": ""}, ["r0"]),
        ({"lora_name": "lora"}, ["r3", "r2", "r1"]),
    ]
    for filters, expected in cases:
        assert [view.id for view in reading.views(**filters)] == expected
    first = reading.requests(limit=3)
    assert (len(first.requests), first.has_more) == (3, True)
    running, finished = reading.one("r2"), reading.one("r1")
    assert (running.num_blocks, finished.num_blocks, finished.finish_reason) == (1, 0, "length")
    assert finished.num_output_tokens == 2
    assert [(chunk.position, chunk.num_tokens) for chunk in finished.chunks] == [(0, 3)]


def test_the_queue_as_if_tenants_took_turns() -> None:
    reading = Reading(max_num_seqs=1)
    reading.add(prompt(3), "running", tenant="a")
    reading.rig.step()
    assert reading.queue().data == []
    for name, tenant in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
        request = reading.add(prompt(5), name, tenant=tenant)
        assert request.record.num_ahead <= 5
    expected = [("a1", 0), ("b1", 0), ("c1", 0), ("a2", 3), ("b2", 3), ("a3", 5)]
    assert [(choice.id, choice.num_ahead) for choice in reading.queue().data] == expected
    assert [choice.id for choice in reading.queue(limit=4).data] == ["a1", "b1", "c1", "a2"]
    assert reading.queue(limit=1).num_waiting == 6
    last = reading.queue().data[-1]
    assert (last.key, last.num_tokens, last.was_preempted, last.can_start) == ("a", 5, False, True)
    for request in reading.rig.scheduler.waiting:
        ahead = next(choice.num_ahead for choice in reading.queue().data if choice.id == request.record.submit.ids[0])
        assert ahead == reading.rig.scheduler.queue.num_ahead(request)
    now = reading.rig.scheduler.clock()
    assert last.waited == pytest.approx(now - 3.0, abs=60)  # or since it was last preempted
    request = next(some for some in reading.rig.scheduler.waiting if some.record.submit.ids[0] == last.id)
    request.record.preemptions += [5.0, 8.0]
    request.record.resumptions += [6.0]
    assert reading.queue().data[-1].waited == pytest.approx(now - 8.0, abs=60)


def test_an_id_names_the_latest_request_that_has_it_with_all_its_choices() -> None:
    reading = Reading(max_num_seqs=4)
    reading.complete(prompt(3), "first")
    reading.add(prompt(3), "second", n=2)
    reading.rig.step()
    found = reading.views(id="same")
    assert [(view.id, view.index) for view in found] == [("second", 0), ("second", 1)]
    assert reading.one("first").state == "finished"
    assert reading.requests(id="none").requests == []
    assert reading.requests(id="first", tenant="another").requests == []
    limited = reading.requests(id="same", limit=1)
    assert (len(limited.requests), limited.has_more) == (1, True)


def why(reading: Reading, id: str, **filters: Any) -> tuple[PrefixResult, int, int | None, int | None, str | None]:
    prefix = reading.one(id, **filters).prefix
    return prefix.result, prefix.num_reusable_tokens, prefix.position, prefix.token_id, prefix.similar_id


def test_why_a_prefix_was_or_was_not_found() -> None:
    reading = Reading(num_blocks=32)
    for id, token_ids, salt, lora_name in (
        ("base", prompt(9), b"", ""),
        ("again", prompt(9), b"", ""),
        ("short", prompt(4), b"", ""),
        ("other", prompt(9, 900), b"", ""),
        ("later", [*prompt(6), 1, *prompt(4, 300)], b"", ""),
        ("salted", prompt(9), b"salt", ""),
        ("adapted", prompt(9), b"adapter", "lora"),
    ):
        reading.complete(token_ids, id, salt=salt, lora_name=lora_name)
    assert why(reading, "base") == (PrefixResult.NEW, 8, None, None, None)
    assert why(reading, "again") == (PrefixResult.FOUND, 8, None, None, None)
    assert why(reading, "short") == (PrefixResult.TOO_SHORT, 0, None, None, None)
    assert why(reading, "other") == (PrefixResult.NEW, 8, None, None, None)
    assert why(reading, "later") == (PrefixResult.DIVERGED, 8, 6, 1, "again")
    assert reading.one("later").num_cached_tokens == 4
    assert why(reading, "salted") == (PrefixResult.OTHER_SALT, 8, None, None, "later")
    assert why(reading, "adapted")[0] is PrefixResult.OTHER_ADAPTER


def test_a_prompt_that_goes_on_where_an_earlier_request_ended() -> None:
    reading = Reading(num_blocks=32)
    reading.complete(prompt(6), "first", max_tokens=1)
    (record,) = reading.recorder.requests
    token_ids = notes_of(record).token_ids
    assert token_ids is not None
    reading.complete([*token_ids, *prompt(6, 700)], "second")
    assert reading.one("second").num_cached_tokens == 4
    assert why(reading, "second") == (PrefixResult.ENDED, 12, None, None, "first")


def test_a_prefix_whose_token_ids_are_forgotten() -> None:
    reading = Reading(num_blocks=32)
    reading.complete(prompt(9), "first")
    notes_of(reading.recorder.requests[-1]).token_ids = None
    for id, token_ids in (("none", [*prompt(4), *prompt(6, 700)]), ("other", [*prompt(2), *prompt(8, 900)])):
        reading.complete(token_ids, id)
    notes_of(reading.recorder.requests[-2]).token_ids = None
    reading.complete([*prompt(4), *prompt(6, 800)], "last")
    assert reading.one("last").num_cached_tokens == 4
    assert why(reading, "none")[0] is PrefixResult.NOT_FOUND
    assert why(reading, "last")[0] is PrefixResult.NOT_FOUND  # "other" has two of the tokens


def test_a_bounded_number_of_tokens_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(num_blocks=64)
    for number in range(4):  # each has more in common with the last one than the one after it
        reading.complete([*prompt(7 - number), *prompt(6, 100 * (number + 5))], f"r{number}", salt=b"a")
    reading.complete(prompt(12), "last", salt=b"b")
    compared: list[int] = []

    def counting(token_ids: Any, other: Any) -> int:
        compared.append(num_common(token_ids, other))
        return compared[-1]

    monkeypatch.setattr("engine.parts.inspection.prefix.num_common", counting)
    assert why(reading, "last")[0] is PrefixResult.OTHER_SALT
    assert compared == [4]  # all others have no more of the first block
    monkeypatch.setattr("engine.parts.inspection.prefix.MAX_COMPARED", 3)
    assert why(reading, "last")[0] is PrefixResult.NOT_FOUND


def test_an_evicted_prefix() -> None:
    reading = Reading(num_blocks=8, keeps_tokens=False)
    reading.complete(prompt(9), "first")
    reading.complete(prompt(30, 500), "large", max_tokens=1)
    reading.add(prompt(9), "again")
    assert why(reading, "again")[0] is PrefixResult.PENDING
    reading.rig.run()
    assert why(reading, "again")[:2] == (PrefixResult.EVICTED, 8)


def test_a_prefix_that_is_not_computed_yet_or_was_generated() -> None:
    reading = Reading(long_prefill_token_threshold=4, num_blocks=32)
    reading.add(prompt(20), "first")
    reading.complete(prompt(20), "second")
    assert why(reading, "first") == (PrefixResult.NEW, 16, None, None, None)
    assert why(reading, "second") == (PrefixResult.NOT_COMPUTED, 16, None, None, "first")
    reading = Reading(separates_prompts=True, num_blocks=32)
    reading.complete(prompt(4), "first", max_tokens=7)  # the model generates 9, 9, 9 ...
    reading.complete([*prompt(4), 9, 9, 9, 9, 5], "second")
    assert why(reading, "second") == (PrefixResult.GENERATED, 8, None, None, "first")
    assert reading.one("second").num_cached_tokens == 4


@pytest.mark.parametrize(
    ("settings", "result"),
    [({"keeps_tokens": False}, PrefixResult.NOT_FOUND), ({"caches_prefixes": False}, PrefixResult.CACHING_OFF)],
)
def test_what_explains_nothing(settings: dict[str, bool], result: PrefixResult) -> None:
    reading = Reading(**settings)
    reading.complete(prompt(9), "first")
    assert why(reading, "first")[0] is result
    assert (notes_of(reading.recorder.requests[0]).token_ids is None) == ("keeps_tokens" in settings)


def test_the_requests_of_other_tenants_explain_nothing() -> None:
    reading = Reading(num_blocks=32)
    reading.complete(prompt(9), "theirs", salt=b"a", tenant="a")
    reading.complete(prompt(9), "mine", salt=b"b", tenant="b")
    assert why(reading, "mine", tenant="b") == (PrefixResult.NEW, 8, None, None, None)
    assert why(reading, "mine") == (PrefixResult.OTHER_SALT, 8, None, None, "theirs")


def test_a_fault_of_the_reader_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading()
    monkeypatch.setattr(reading.reader, "_steps", lambda question: 1 / 0)
    assert reading.reader.answer(ReadSteps(limit=1)) is None


FEW = st.lists(st.integers(0, 1), max_size=8)


@given(same=st.integers(0, 2 * PART + 2), own=FEW, other=FEW)
def test_the_common_start_of_two_sequences(same: int, own: list[int], other: list[int]) -> None:
    pairs = enumerate(zip(own, other, strict=False))
    num_same = next((number for number, (left, right) in pairs if left != right), min(len(own), len(other)))
    assert num_common(array("i", [7] * same + own), [7] * same + other) == same + num_same
