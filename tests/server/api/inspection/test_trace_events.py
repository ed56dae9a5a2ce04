"""Traces made from records: what Perfetto needs, sums of durations, and places of slices, all computed another way."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.record import RequestRecord
from engine.shared.records import Chunk, Prefix, PrefixResult, RequestDetail, StepInfo
from server.api.inspection.schemas import Trace, TraceInfo
from server.api.inspection.trace_events import TraceBuilder
from server.api.inspection.views import stages
from server.generation.timings import stage_spans
from tests.support.chrome_trace import check_trace, requests_in, tracks
from tests.support.records import example_step

OFFSET = 1.7e9  # Unix time of the engine's times
STAGES = ("tokenizing", "queue", "prefill", "decode", "preempted")


def built(trace: TraceBuilder) -> dict[str, Any]:
    """Return a trace as a client gets it."""
    whole = Trace(trace_events=trace.events, other_data=TraceInfo(engine="e", is_complete=True))
    answer: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))
    return answer


def detail_of(chunks: tuple[Chunk, ...] = ()) -> RequestDetail:
    return RequestDetail(chunks=list(chunks), prefix=Prefix(result=PrefixResult.NEW, num_reusable_tokens=0))


def is_running(record: RequestRecord) -> bool:
    return len(record.preemptions) == len(record.resumptions)


@st.composite
def lives(draw: st.DrawFn) -> tuple[RequestRecord, float]:
    """A choice that is queued, scheduled, and then preempted and resumed in turn, and the time when it is read."""
    durations = draw(st.lists(st.floats(0, 100), min_size=1, max_size=12))
    has_first_token = draw(st.integers(0, 12))
    times = [1.0]
    for duration in durations:
        times.append(times[-1] + duration)
    record = RequestRecord("r-0", 0, arrival=1.0, queued=times[1], num_prompt_tokens=5)
    for number, moment in enumerate(times[2:]):
        if number == 0:
            record.scheduled = moment
        elif number >= has_first_token and record.first_token is None and is_running(record):
            record.first_token = moment
        elif is_running(record):
            record.preemptions.append(moment)
        else:
            record.resumptions.append(moment)
    if draw(st.booleans()) and is_running(record):
        record.finished = times[-1]
    return record, times[-1]


@given(life=lives(), chunk_steps=st.lists(st.tuples(st.floats(0, 50), st.floats(0.001, 50)), max_size=5))
def test_the_slices_of_a_choice(life: tuple[RequestRecord, float], chunk_steps: list[tuple[float, float]]) -> None:
    """Whatever the steps of its chunks were, slices nest, and the stages fill the wall time to the microsecond."""
    record, now = life
    times = record.times()
    spans = stage_spans(times, now)
    assert (spans[0].start, spans[-1].end) == (record.arrival, now)
    assert all(before.end == after.start <= after.end for before, after in pairwise(spans))
    sums = {name: sum(span.end - span.start for span in spans if span.name == name) for name in STAGES}
    expected = stages(times, now)
    assert sums == pytest.approx({name: getattr(expected, name) for name in STAGES}, abs=1e-6)
    if record.finished is None and record.preemptions and not is_running(record):
        assert expected.preempted >= now - record.preemptions[-1] - 1e-9
    trace = TraceBuilder(OFFSET)
    at = 0.0
    for number, (pause, seconds) in enumerate(chunk_steps):
        at += pause
        trace.add_steps([step(number + 1, at, {"forward": seconds})])
    chunks = tuple(Chunk(number + 1, 4 * number, 4) for number in range(len(chunk_steps)))
    trace.add_choice("r 0.0", times, detail_of(chunks), now, {"id": "r"})
    answer = built(trace)
    check_trace(answer)
    wall = round(1e6 * (now + OFFSET)) - round(1e6 * (record.arrival + OFFSET))
    if wall == 0:
        assert requests_in(answer) == []
        return
    ((whole, *parts),) = requests_in(answer)
    assert whole["dur"] == wall == sum(part["dur"] for part in parts if part["name"] in STAGES)
    computing = [part for part in parts if part["name"] in ("prefill", "decode")]
    for chunk in (part for part in parts if part["name"] == "chunk"):
        assert any(
            stage["ts"] <= chunk["ts"] and chunk["ts"] + chunk["dur"] <= stage["ts"] + stage["dur"]
            for stage in computing
        )


def step(step_id: int, started: float, seconds: dict[str, float], tenants: tuple[str, ...] = ()) -> StepInfo:
    return msgspec.structs.replace(example_step(step_id, tenants), started=started, seconds=seconds)


def test_what_a_step_computed() -> None:
    trace = TraceBuilder(OFFSET)
    trace.add_steps([step(7, 2.0, {"schedule": 0.001, "forward": 0.5}, tenants=("a", "b"))])
    answer = built(trace)
    whole, first, second = tracks(answer)[1, 1]
    assert (whole["ts"], whole["dur"]) == (1_700_000_002_000_000, 501_000)
    assert (first["name"], first["ts"], first["dur"]) == ("schedule", whole["ts"], 1000)
    assert (second["name"], second["ts"], second["dur"]) == ("forward", whole["ts"] + 1000, 500_000)
    assert whole["args"] == {
        **{"id": 7, "choices": 2, "prompt_tokens": 0, "generated_tokens": 4, "drafts": 4, "accepted_drafts": 2}
    }
    counters = [(event["name"], event["args"]) for event in answer["traceEvents"] if event["ph"] == "C"]
    assert counters == [("choices", {"running": 2, "waiting": 1}), ("KV blocks", {"used": 3})]


def test_steps_that_overlap_have_tracks_of_their_own() -> None:
    """The parts fill their step, though none of them takes whole microseconds."""
    trace = TraceBuilder(OFFSET)
    parts = {"schedule": 1.4e-6, "forward": 0.15, "wait": 1.4e-6, "update": 1.4e-6}
    trace.add_steps(step(number, 0.1 * number, parts) for number in range(1, 6))
    answer = built(trace)
    check_trace(answer)
    found = {}
    for track, slices in tracks(answer).items():
        wholes = [event for event in slices if event["name"] == "step"]
        assert 2 * sum(event["dur"] for event in wholes) == sum(event["dur"] for event in slices)
        found[track] = [event["args"]["id"] for event in wholes]
    assert found == {(1, 1): [1, 3, 5], (1, 2): [2, 4]}


def test_a_prompt_in_two_chunks() -> None:
    trace = TraceBuilder(OFFSET)
    trace.add_steps([step(1, 3.0, {"forward": 1.0}), step(2, 4.0, {"forward": 1.0, "update": 1.0})])
    record = RequestRecord("r-0", 0, arrival=1.0, queued=2.0, num_prompt_tokens=9, scheduled=3.25, first_token=5.5)
    detail = detail_of((Chunk(1, 0, 8), Chunk(2, 8, 1), Chunk(99, 9, 1)))
    trace.add_choice("r 0.0", record.times(), detail, 8.0, {})
    ((_, *parts),) = requests_in(built(trace))
    second = 1_000_000
    assert [(part["name"], part["ts"] - 1_700_000_000 * second, part["dur"]) for part in parts] == [
        ("tokenizing", second, second),
        ("queue", 2 * second, 1_250_000),
        ("prefill", 3_250_000, 2_250_000),
        ("decode", 5_500_000, 2_500_000),
        ("chunk", 3_250_000, 750_000),
        ("chunk", 4 * second, 1_500_000),
    ]
