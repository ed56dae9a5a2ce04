"""Records of the last steps and the last requests, in bounded ring buffers. No torch."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass

import msgspec

from engine.parts.inspection.records import PrefixResult, StepRowView, StepView
from engine.scheduling.record import RequestRecord, StepClock
from engine.scheduling.request import Request, Step
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import SamplingParams

NUM_STEPS_KEPT = 4096
NUM_REQUESTS_KEPT = 1024
MAX_ROWS_KEPT = 1 << 17  # of all steps
MAX_KEPT_BYTES = 64 << 20  # of the token ids and parameters of finished requests
TOKEN_BYTES = 4
PARAMETER_BYTES = 10  # that an object takes for a byte of its encoding, about
MAX_EVICTED = 1 << 15  # hashes of overwritten blocks that are remembered, about 4 MB
BORROWED = b"borrowed "  # begins the hash of a block that is borrowed, and that of no prefix
NO_PARAMS = SamplingParams(max_tokens=0)


def is_prefix(block_hash: bytes | None) -> bool:
    """Return whether later requests find the block that is published under this hash."""
    return block_hash is not None and not block_hash.startswith(BORROWED)


@dataclass(slots=True)
class Notes:
    """What is noted of a request beside its record, from its first batch or its end on."""

    salt: bytes  # of its cached prefixes
    prefix_result: PrefixResult = PrefixResult.PENDING
    num_reusable_tokens: int = 0  # of the prompt, with an ideal prefix cache
    num_found_tokens: int = 0  # whose keys and values were cached
    token_ids: array[int] | None = None  # int32, prompt and output, once it has ended; None: they are not kept
    num_kept_bytes: int = 0  # of these and its parameters, once it has ended


def notes_of(record: RequestRecord) -> Notes:
    """Return the notes of a request that has begun, or ended."""
    notes: Notes = record.notes
    return notes


def shown_id(record: RequestRecord) -> str:
    """Return the id by which a request is shown. Work that no client has asked for has only the engine's own."""
    return record.submit.ids[0] if record.submit.ids else record.submit.request_id


class Recorder:
    """The records of the last steps and the last finished requests. An unfinished request holds its own record."""

    def __init__(
        self,
        scheduler: Scheduler,
        num_steps: int = NUM_STEPS_KEPT,
        num_requests: int = NUM_REQUESTS_KEPT,
        *,
        keeps_tokens: bool = False,
    ) -> None:
        """Record the requests of a scheduler from now on, and the steps that `add_step` gets.

        `keeps_tokens`: keep token ids and parameters of finished requests, at most `MAX_KEPT_BYTES` of them.
        """
        self.scheduler = scheduler
        self.steps: deque[StepView] = deque(maxlen=num_steps)
        self.requests: deque[RequestRecord] = deque(maxlen=num_requests)
        self.keeps_tokens = keeps_tokens
        self.num_kept_bytes = 0
        self.num_rows = 0  # of all steps
        self.last_dropped = 0  # id of the latest step that is no longer recorded
        self.evicted: OrderedDict[bytes, None] = OrderedDict()  # hashes of overwritten blocks, the latest last
        scheduler.lifecycle.on_start.append(self.begin_request)
        scheduler.lifecycle.on_end.append(self.add_request)
        scheduler.pool.on_evict.append(self.add_evicted)

    def add_step(self, step: Step, clock: StepClock) -> None:
        """Add a step that has been read."""
        running, waiting = self.scheduler.running.requests, self.scheduler.waiting.requests
        num_children = sum([len(request.children) for request in (*running, *waiting)])
        rows = [
            StepRowView(
                id=shown_id(record := item.request.record),
                prompt=record.submit.prompt,
                index=record.index,
                key=record.submit.tenant,
                position=item.start,
                num_tokens=item.num_tokens,
                kind="prompt" if item.is_prompt else "generated",
                num_generated=item.num_generated,
                num_drafts=len(item.draft_token_ids),
                num_accepted=item.num_accepted,
            )
            for item in step.scheduled
        ]
        self.keep_step(
            StepView(
                id=step.step_id,
                started=clock.started,
                seconds=clock.seconds,
                num_running=len(running),
                num_waiting=len(waiting) + num_children,
                num_blocks_used=self.scheduler.pool.num_blocks - self.scheduler.pool.num_free,
                rows=rows,
            )
        )

    def keep_step(self, step: StepView) -> None:
        """Keep a step. The oldest ones are dropped if there are too many, or if they have too many rows together."""
        self.num_rows += len(step.rows)
        while self.steps and (self.num_rows > MAX_ROWS_KEPT or len(self.steps) == self.steps.maxlen):
            oldest = self.steps.popleft()
            self.num_rows -= len(oldest.rows)
            self.last_dropped = oldest.id
        self.steps.append(step)

    def begin_request(self, request: Request) -> None:
        """Note why a request that was just admitted has as much of its prompt cached as it has."""
        block_size = self.scheduler.pool.block_size
        num_usable = 0 if request.reads_all_rows else (len(request.token_ids) - 1) // block_size
        num_cached = request.kv.num_computed // block_size
        num_found = max(request.kv.num_found, request.kv.num_computed)
        if request.reads_all_rows:
            result = PrefixResult.ALL_ROWS
        elif num_usable == 0:
            result = PrefixResult.TOO_SHORT
        elif num_cached == num_usable:
            result = PrefixResult.FOUND
        elif num_found > request.kv.num_computed:
            result = PrefixResult.NO_SNAPSHOT
        else:
            missing = request.kv.block_hashes[num_cached]
            was_there = any(missing + suffix in self.evicted for suffix in self.scheduler.kv.suffixes)
            result = PrefixResult.EVICTED if was_there else PrefixResult.NOT_FOUND
        request.record.notes = Notes(request.kv.salt, result, num_usable * block_size, num_found)

    def add_evicted(self, block_hash: bytes) -> None:
        """Remember the hash of a block that is overwritten."""
        if is_prefix(block_hash):
            self.evicted[block_hash] = None
            if len(self.evicted) > MAX_EVICTED:
                self.evicted.popitem(last=False)

    def add_request(self, request: Request) -> None:
        """Add a request that has ended. If what is kept exceeds its limit, the oldest is forgotten."""
        record = request.record
        if len(self.requests) == self.requests.maxlen:
            self._forget(self.requests.popleft())
        self.requests.append(record)
        notes = record.notes = record.notes or Notes(request.kv.salt)
        if not self.keeps_tokens:
            self._forget(record)
            return
        notes.token_ids = array("i", request.token_ids)
        notes.num_kept_bytes = TOKEN_BYTES * len(request.token_ids)
        notes.num_kept_bytes += PARAMETER_BYTES * len(msgspec.msgpack.encode(record.submit.params))
        self.num_kept_bytes += notes.num_kept_bytes
        for oldest in self.requests:
            if self.num_kept_bytes <= MAX_KEPT_BYTES:
                return
            self._forget(oldest)

    def _forget(self, record: RequestRecord) -> None:
        notes = notes_of(record)
        self.num_kept_bytes -= notes.num_kept_bytes
        notes.token_ids, notes.num_kept_bytes = None, 0
        record.submit = msgspec.structs.replace(record.submit, params=NO_PARAMS)
