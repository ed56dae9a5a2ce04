"""`/lightwell/v1/trace` and `/lightwell/v1/requests/{id}/trace`: what the engine did, on a time axis.

It is in Chrome's trace format. Each time is rounded to a microsecond before durations are computed, so that slices lie
within the slice that they are part of, those that follow one another meet, and their durations add up.
"""

import math
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Literal, NamedTuple

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response

from engine.parts.inspection import records
from engine.shared.messages import RequestTimes
from server.generation.generation import stage_spans
from server.parts.inspection.access import EngineNumber, RecordAccess, check_may_read, read_request

STEPS_AT_A_TIME = 256  # between them, other requests are served
MAX_QUESTIONS = 40  # for steps
MAX_TRACED = 256  # choices
MAX_SECONDS = 600

# What Perfetto shows of a choice.
SHOWN: tuple[str, ...] = ("id", "prompt", "index", "key", "model", "state", "finish_reason")
SHOWN += ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "num_accepted_tokens", "num_preemptions")

ENGINE, REQUESTS = 1, 2  # the two groups of tracks, which the format calls processes
FIRST_CHOICE = 100  # number of the first choice's track; those of the engine come before

Args = dict[str, str | int | None]


router = APIRouter(dependencies=[Depends(check_may_read)])


class TraceEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of Chrome's trace format. Times are whole microseconds; `ts` is a Unix time."""

    ph: Literal["X", "C", "M"]  # a slice of a track; values of counters; the name or the place of a track
    name: str
    pid: int
    tid: int  # the track
    ts: int | None = None
    dur: int | None = None
    args: dict[str, str | int | None] | None = None


class TraceInfo(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    is_complete: bool  # no steps or choices are missing


class Trace(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A trace that Perfetto and chrome://tracing open."""

    trace_events: list[TraceEvent]
    display_time_unit: Literal["ms"] = "ms"
    other_data: TraceInfo


class Slice(NamedTuple):
    """A name, and its start and end in microseconds of Unix time."""

    name: str
    start: int
    end: int


class TraceBuilder:
    """Collects the events of a trace: first steps, then the choices that they computed tokens of."""

    def __init__(self, clock_offset: float) -> None:
        """`clock_offset`: Unix time of the engine's times."""
        self.events = [_label("process_name", ENGINE, 0, "engine"), _label("process_name", REQUESTS, 0, "requests")]
        self._clock_offset = clock_offset
        self._track_ends: list[int] = []  # of the last step on each track of the engine
        self._steps: dict[int, Slice] = {}  # by id
        self._num_choices = 0

    def add_steps(self, steps: Iterable[records.StepView]) -> None:
        """Add steps, in the order in which they have started, each with its parts."""
        for step in steps:
            bounds = [
                self._microseconds(step.started + seconds) for seconds in accumulate(step.seconds.values(), initial=0.0)
            ]
            whole = self._steps[step.id] = Slice("step", bounds[0], bounds[-1])
            track = self._track(whole)
            self._add_slice(whole, ENGINE, track, _step_args(step))
            for part, (start, end) in zip(step.seconds, pairwise(bounds), strict=True):
                self._add_slice(Slice(part, start, end), ENGINE, track)
            self._add_counters("choices", whole.end, {"running": step.num_running, "waiting": step.num_waiting})
            self._add_counters("KV blocks", whole.end, {"used": step.num_blocks_used})

    def _track(self, step: Slice) -> int:
        """Return a track on which a step overlaps no other: on a GPU, the next one starts before the last one ends."""
        for index, end in enumerate(self._track_ends):
            if end <= step.start:
                self._track_ends[index] = step.end
                return index + 1
        self._track_ends.append(step.end)
        track = len(self._track_ends)
        self.events.append(_label("thread_name", ENGINE, track, "steps"))
        return track

    def add_choice(
        self, name: str, times: RequestTimes, chunks: Sequence[records.ChunkView], now: float, args: Args
    ) -> None:
        """Add a track with the stages of a choice, and the prompt chunks in them. `now` is when they were reported."""
        track = FIRST_CHOICE + self._num_choices
        self._num_choices += 1
        stages = [
            Slice(span.name, self._microseconds(span.start), self._microseconds(span.end))
            for span in stage_spans(times, now)
        ]
        self.events += [
            _label("thread_name", REQUESTS, track, name),
            TraceEvent(ph="M", name="thread_sort_index", pid=REQUESTS, tid=track, args={"sort_index": track}),
        ]
        self._add_slice(Slice("request", stages[0].start, stages[-1].end), REQUESTS, track, args)
        for stage in stages:
            self._add_slice(stage, REQUESTS, track)
        computing = [stage for stage in stages if stage.name in ("prefill", "decode")]
        self._add_chunks(chunks, computing, track)

    def _add_chunks(self, chunks: Sequence[records.ChunkView], stages: Sequence[Slice], track: int) -> None:
        """Add the part of each chunk's step that lies within a stage and after the chunk before."""
        index, last_end = 0, 0
        for chunk in chunks:
            if (step := self._steps.get(chunk.step)) is None:
                continue
            while index < len(stages) - 1 and stages[index].end <= step.start:
                index += 1
            start, end = max(step.start, stages[index].start, last_end), min(step.end, stages[index].end)
            args: Args = {"step": chunk.step, "position": chunk.position, "num_tokens": chunk.num_tokens}
            self._add_slice(Slice("chunk", start, end), REQUESTS, track, args)
            last_end = max(last_end, end)

    def _add_slice(self, part: Slice, process: int, track: int, args: Args | None = None) -> None:
        """Add a slice, unless it is shorter than a microsecond."""
        name, start, duration = part.name, part.start, part.end - part.start
        if duration > 0:
            self.events.append(TraceEvent(ph="X", name=name, pid=process, tid=track, ts=start, dur=duration, args=args))

    def _add_counters(self, name: str, at: int, values: Args) -> None:
        self.events.append(TraceEvent(ph="C", name=name, pid=ENGINE, tid=0, ts=at, args=values))

    def _microseconds(self, time: float) -> int:
        return round(1e6 * (time + self._clock_offset))


def _label(kind: str, process: int, track: int, name: str) -> TraceEvent:
    return TraceEvent(ph="M", name=kind, pid=process, tid=track, args={"name": name})


def _step_args(step: records.StepView) -> Args:
    return {
        "id": step.id,
        "choices": len(step.rows),
        "prompt_tokens": sum(row.num_tokens for row in step.rows if row.kind == "prompt"),
        "generated_tokens": sum(row.num_generated for row in step.rows),
        "drafts": sum(row.num_drafts for row in step.rows),
        "accepted_drafts": sum(row.num_accepted for row in step.rows),
    }


@router.get("/lightwell/v1/trace")
async def trace_engine(
    request: Request,
    seconds: Annotated[
        float, Query(gt=0, le=MAX_SECONDS, allow_inf_nan=False, description="How far back the trace goes.")
    ] = 10.0,
    engine: EngineNumber = 0,
) -> Response:
    """Return the last steps, and the choices that have not ended before them, in Chrome's trace format."""
    access, since = RecordAccess(request, engine), time.monotonic() - seconds
    trace = TraceBuilder(access.questions.clock_offset)
    is_complete = await _add_steps(access, trace, since)
    answer = await access.ask(
        records.ReadRequests(tenant=access.own_name, since=since, limit=MAX_TRACED), records.Requests
    )
    return await access.respond(_whole, access, trace, answer, is_complete)


@router.get("/lightwell/v1/requests/{request_id}/trace")
async def trace_request(request: Request, request_id: str) -> Response:
    """Return one request, and the steps from its beginning to its end, in Chrome's trace format."""
    access, answer = await read_request(RecordAccess(request), request_id)
    times = [info.times for info in answer.requests]
    since = min(each.queued for each in times)
    until = max(answer.now if each.finished is None else each.finished for each in times)
    trace = TraceBuilder(access.questions.clock_offset)
    is_complete = await _add_steps(access, trace, since, until)
    return await access.respond(_whole, access, trace, answer, is_complete)


async def _add_steps(access: RecordAccess, trace: TraceBuilder, since: float, until: float = math.inf) -> bool:
    """Add the steps that started between two times. Return whether these are all."""
    after: int | None = None
    num_lost = 0
    for _ in range(MAX_QUESTIONS):
        answer = await access.ask(records.ReadSteps(after=after, since=since, limit=STEPS_AT_A_TIME), records.StepList)
        num_lost += answer.num_lost
        await access.run(trace.add_steps, [step for step in answer.data if step.started <= until])
        if not answer.has_more or answer.data[-1].started > until:
            return num_lost == 0
        after = answer.data[-1].id
    return False


def _whole(access: RecordAccess, trace: TraceBuilder, answer: records.Requests, is_complete: bool) -> Trace:
    """Add the choices to the steps. `is_complete`: these are all."""
    for info in sorted(answer.requests, key=lambda each: (each.times.queued, each.view.prompt, each.view.index)):
        view = access.show_request(info)
        args: Args = {name: getattr(view, name) for name in SHOWN}
        trace.add_choice(f"{view.id} {view.prompt}.{view.index}", info.times, view.chunks, answer.now, args)
    about = TraceInfo(engine=access.engine_id, is_complete=is_complete and not answer.has_more)
    return Trace(trace_events=trace.events, other_data=about)
