"""Records of steps and requests, kept in bounded ring buffers.

The timings in a request's events, from which metrics are made, are read from its record. Times are seconds of
`time.monotonic()`, or of the clock that a test turns.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from engine.shared.messages import SamplingParams
from engine.shared.records import Chunk, PrefixResult, RequestTimes

NUM_STEPS_KEPT = 4096
NUM_REQUESTS_KEPT = 1024
MAX_ROWS_KEPT = 1 << 17  # of all steps; each may be the only one that holds the record of its request, about 1 KB
MAX_KEPT_BYTES = 64 << 20  # of the token ids and parameters of finished requests
TOKEN_BYTES = 4
PARAMETER_BYTES = 10  # that an object takes for a byte of its encoding, about


@dataclass(slots=True)
class RequestRecord:
    """Whose request a choice belongs to, its times and its token counts."""

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
    chunks: list[Chunk] = field(default_factory=list)
    num_ahead: int = 0  # choices ahead of it when it joined the queue
    preemptions: list[float] = field(default_factory=list)
    resumptions: list[float] = field(default_factory=list)  # when it was scheduled again after each preemption
    ids: tuple[str, ...] = ()  # see `Submit.ids`
    prompt: int = 0  # see `Submit.prompt`
    tenant: str = ""
    lora_name: str = ""  # empty: no LoRA adapter
    salt: bytes = b""  # of its cached prefixes
    prefix_result: PrefixResult = PrefixResult.PENDING
    num_reusable_tokens: int = 0  # of the prompt, with an ideal prefix cache
    lora_fingerprint: str = ""
    params: SamplingParams | None = None  # None: they are not kept
    token_ids: array[int] | None = None  # int32, prompt and output, once it has ended; None: they are not kept
    num_kept_bytes: int = 0  # of these two, once it has ended

    @property
    def shown_id(self) -> str:
        """The id by which the request is shown. Work that no client has asked for has only the engine's own."""
        return self.ids[0] if self.ids else self.request_id

    @property
    def name(self) -> tuple[str, int, int, str]:
        """The fields of its `ChoiceName`."""
        return self.shown_id, self.prompt, self.index, self.tenant

    def take_back(self, step_id: int) -> None:
        """Remove what a step that does not run was to compute, if it is the last one."""
        if self.chunks and self.chunks[-1].step_id == step_id:
            self.chunks.pop()

    def times(self) -> RequestTimes:
        """Return the timings so far, as sent with the request's events."""
        return RequestTimes(
            arrival=self.arrival,
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


class RowRecord(NamedTuple):
    """What one step computed for a choice."""

    request: RequestRecord
    position: int  # of its first token
    num_tokens: int
    is_prompt: bool  # it computed prompt tokens; otherwise generated ones
    num_generated: int
    num_drafts: int  # draft tokens, part of `num_tokens`
    num_accepted: int  # draft tokens that were accepted


@dataclass(slots=True)
class StepRecord:
    """What one step computed, and how long each part of it took."""

    step_id: int
    started: float
    rows: list[RowRecord]
    num_running: int
    num_waiting: int
    num_blocks_used: int
    seconds: dict[str, float] = field(default_factory=dict)  # part of the step -> duration

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


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


class Recorder:
    """The records of the last steps and the last finished requests. An unfinished request holds its own record."""

    def __init__(
        self,
        num_steps: int = NUM_STEPS_KEPT,
        num_requests: int = NUM_REQUESTS_KEPT,
        *,
        keeps_tokens: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keeps_tokens`: keep token ids and parameters of finished requests, at most `MAX_KEPT_BYTES` of them.

        `clock`: tells the time of all that is recorded, and of the queue of the requests.
        """
        self.clock = clock
        self.steps: deque[StepRecord] = deque(maxlen=num_steps)
        self.requests: deque[RequestRecord] = deque(maxlen=num_requests)
        self.keeps_tokens = keeps_tokens
        self.num_kept_bytes = 0
        self.num_rows = 0  # of all steps
        self.last_dropped = 0  # id of the latest step that is no longer recorded

    def add_step(self, record: StepRecord) -> None:
        """Add a step. The oldest ones are dropped if there are too many, or if they have too many rows together."""
        self.num_rows += len(record.rows)
        while self.steps and (self.num_rows > MAX_ROWS_KEPT or len(self.steps) == self.steps.maxlen):
            oldest = self.steps.popleft()
            self.num_rows -= len(oldest.rows)
            self.last_dropped = oldest.step_id
        self.steps.append(record)

    def add_request(self, record: RequestRecord, token_ids: Sequence[int] = ()) -> None:
        """Add the record of a request that has ended. If what is kept exceeds its limit, the oldest is forgotten."""
        if len(self.requests) == self.requests.maxlen:
            self._forget(self.requests.popleft())  # rows of steps may still hold the record
        self.requests.append(record)
        if not self.keeps_tokens:
            record.params = None
            return
        record.token_ids = array("i", token_ids)
        record.num_kept_bytes = TOKEN_BYTES * len(token_ids)
        if record.params is not None:
            record.num_kept_bytes += PARAMETER_BYTES * len(msgspec.msgpack.encode(record.params))
        self.num_kept_bytes += record.num_kept_bytes
        for oldest in self.requests:
            if self.num_kept_bytes <= MAX_KEPT_BYTES:
                return
            self._forget(oldest)

    def _forget(self, record: RequestRecord) -> None:
        self.num_kept_bytes -= record.num_kept_bytes
        record.token_ids, record.params, record.num_kept_bytes = None, None, 0
