"""What is recorded of a request for its events, from whose times metrics are made, and the clock of a step.

Times are seconds of `time.monotonic()`, or of the clock that a test turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from engine.shared.messages import RequestTimes, Submit


class Chunk(NamedTuple):
    """Prompt tokens, or tokens lost to a preemption, that one step computed for a choice."""

    step_id: int
    start: int
    num_tokens: int


class RequestRecord(RequestTimes, kw_only=True):
    """Whose request a choice belongs to, its times and its token counts."""

    submit: Submit  # without the prompt
    index: int
    finish_reason: str | None = None
    chunks: list[Chunk] = []
    notes: Any = None  # of the part that shows what the engine does

    def take_back(self, step_id: int) -> None:
        """Remove what a step that does not run was to compute, if it is the last one."""
        if self.chunks and self.chunks[-1].step_id == step_id:
            self.chunks.pop()

    def times(self) -> RequestTimes:
        """Return the timings so far, as sent with the request's events."""
        self.num_chunks = len(self.chunks)
        return msgspec.convert(self, RequestTimes, from_attributes=True)


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
