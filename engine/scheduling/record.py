"""What is recorded of a request for its events, from whose times metrics are made, and the clock of a step.

Times are seconds of `time.monotonic()`, or of the clock that a test turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.shared.messages import RequestTimes, Submit


class Chunk(NamedTuple):
    """Prompt tokens, or tokens lost to a preemption, that one step computed for a choice."""

    step_id: int
    start: int
    num_tokens: int


@dataclass(slots=True)
class RequestRecord:
    """Whose request a choice belongs to, its times and its token counts."""

    submit: Submit  # without the prompt
    index: int
    queued: float  # when the engine received it
    num_prompt_tokens: int
    scheduled: float | None = None  # first time in a batch
    first_token: float | None = None
    finished: float | None = None
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_accepted_tokens: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    num_ahead: int = 0  # choices ahead of it when it joined the queue
    preemptions: list[float] = field(default_factory=list)
    resumptions: list[float] = field(default_factory=list)  # when it was scheduled again after each preemption
    notes: Any = None  # of the part that shows what the engine does

    def take_back(self, step_id: int) -> None:
        """Remove what a step that does not run was to compute, if it is the last one."""
        if self.chunks and self.chunks[-1].step_id == step_id:
            self.chunks.pop()

    def times(self) -> RequestTimes:
        """Return the timings so far, as sent with the request's events."""
        return RequestTimes(
            arrival=self.submit.arrival,
            queued=self.queued,
            scheduled=self.scheduled,
            first_token=self.first_token,
            finished=self.finished,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            preemptions=tuple(self.preemptions),
            resumptions=tuple(self.resumptions),
            num_ahead=self.num_ahead,
            num_chunks=len(self.chunks),
            num_accepted_tokens=self.num_accepted_tokens,
        )


class StepClock:
    """Measures how long each part of a step takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self.started = clock()
        self.laps: list[tuple[str, float]] = []  # parts, and when they ended: each began where the one before did

    def lap(self, part: str) -> None:
        """Note that a part ends now."""
        self.laps.append((part, self.now()))

    @property
    def seconds(self) -> dict[str, float]:
        """The duration of each part."""
        seconds: dict[str, float] = {}
        last = self.started
        for part, end in self.laps:
            seconds[part] = seconds.get(part, 0.0) + end - last
            last = end
        return seconds
