"""Records of steps and requests, kept in bounded ring buffers.

The timings in a request's events, from which metrics are made, are read from its record. Times are seconds of
`time.monotonic()`.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from engine.shared.messages import RequestTimes

NUM_STEPS_KEPT = 4096
NUM_REQUESTS_KEPT = 1024


@dataclass(slots=True)
class ChunkRecord:
    """Prompt tokens, or tokens lost to a preemption, that one step computed for a request."""

    step_id: int
    start: int
    num_tokens: int


@dataclass(slots=True)
class RequestRecord:
    """Times and token counts of one choice."""

    request_id: str
    index: int
    arrival: float  # when the API process received it
    queued: float  # when the engine received it
    num_prompt_tokens: int
    scheduled: float | None = None  # first time in a batch
    first_token: float | None = None
    finished: float | None = None
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_accepted_tokens: int = 0
    chunks: list[ChunkRecord] = field(default_factory=list)
    num_ahead: int = 0  # choices ahead of it when it joined the queue
    preemptions: list[float] = field(default_factory=list)
    resumptions: list[float] = field(default_factory=list)  # when it was scheduled again after each preemption

    def take_back(self, step_id: int) -> None:
        """Remove what a step that does not run was to compute, if it is the last one."""
        if self.chunks and self.chunks[-1].step_id == step_id:
            self.chunks.pop()

    def times(self) -> RequestTimes:
        """Return the timings so far, as sent with the request's events."""
        waits = zip(self.preemptions, self.resumptions, strict=False)  # a request may end while preempted
        waited_before, waited_after = 0.0, 0.0
        for preempted, resumed in waits:
            if self.first_token is None or preempted < self.first_token:
                waited_before += resumed - preempted
            else:
                waited_after += resumed - preempted
        return RequestTimes(
            arrival=self.arrival,
            queued=self.queued,
            scheduled=self.scheduled,
            first_token=self.first_token,
            finished=self.finished,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=len(self.preemptions),
            num_ahead=self.num_ahead,
            preempted_before_first_token=waited_before,
            preempted_after_first_token=waited_after,
            num_chunks=len(self.chunks),
            num_accepted_tokens=self.num_accepted_tokens,
        )


@dataclass(slots=True)
class StepRecord:
    """What one step computed, and how long each part of it took."""

    step_id: int
    started: float
    scheduled: list[tuple[str, int, int, int]]  # (request_id, index, first position, number of tokens)
    num_running: int
    num_waiting: int
    num_blocks_used: int
    seconds: dict[str, float] = field(default_factory=dict)  # part of the step -> duration

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for *_, num_tokens in self.scheduled)


class StepClock:
    """Measures how long each part of a step takes."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


class Recorder:
    """The records of the last steps and the last finished requests. An unfinished request holds its own record."""

    def __init__(self, num_steps: int = NUM_STEPS_KEPT, num_requests: int = NUM_REQUESTS_KEPT) -> None:
        self.steps: deque[StepRecord] = deque(maxlen=num_steps)
        self.requests: deque[RequestRecord] = deque(maxlen=num_requests)

    def add_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def add_request(self, record: RequestRecord) -> None:
        self.requests.append(record)
