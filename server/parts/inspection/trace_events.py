"""Makes a trace in Chrome's format from the engine's records.

Each time is rounded to a microsecond before durations are computed, so that slices lie within the slice that they are
part of, those that follow one another meet, and their durations add up.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from engine.shared.records import Chunk, RequestDetail, RequestTimes, StepInfo
from server.generation.generation import stage_spans
from server.parts.inspection.schemas import TraceEvent

ENGINE, REQUESTS = 1, 2  # the two groups of tracks, which the format calls processes
FIRST_CHOICE = 100  # number of the first choice's track; those of the engine come before

Args = dict[str, str | int | None]


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

    def add_steps(self, steps: Iterable[StepInfo]) -> None:
        """Add steps, in the order in which they have started, each with its parts."""
        for step in steps:
            bounds = [
                self._microseconds(step.started + seconds) for seconds in accumulate(step.seconds.values(), initial=0.0)
            ]
            whole = self._steps[step.step_id] = Slice("step", bounds[0], bounds[-1])
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

    def add_choice(self, name: str, times: RequestTimes, detail: RequestDetail, now: float, args: Args) -> None:
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
        self._add_chunks(detail.chunks, computing, track)

    def _add_chunks(self, chunks: Sequence[Chunk], stages: Sequence[Slice], track: int) -> None:
        """Add the part of each chunk's step that lies within a stage and after the chunk before."""
        index, last_end = 0, 0
        for chunk in chunks:
            if (step := self._steps.get(chunk.step_id)) is None:
                continue
            while index < len(stages) - 1 and stages[index].end <= step.start:
                index += 1
            start, end = max(step.start, stages[index].start, last_end), min(step.end, stages[index].end)
            args: Args = {"step": chunk.step_id, "position": chunk.start, "num_tokens": chunk.num_tokens}
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


def _step_args(step: StepInfo) -> Args:
    return {
        "id": step.step_id,
        "choices": len(step.rows),
        "prompt_tokens": sum(row.num_tokens for row in step.rows if row.is_prompt),
        "generated_tokens": sum(row.num_generated for row in step.rows),
        "drafts": sum(row.num_drafts for row in step.rows),
        "accepted_drafts": sum(row.num_accepted for row in step.rows),
    }
