"""Answers questions about the engine's records and state. Nothing here runs unless somebody asks. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

from engine.parts.inspection.blocks import read_blocks
from engine.parts.inspection.prefix import explain_prefix
from engine.scheduling.fair_queue import order_key
from engine.scheduling.record import Recorder, RequestRecord, RowRecord, StepRecord
from engine.scheduling.request import Request, Status
from engine.scheduling.scheduler import Scheduler
from engine.shared.records import (
    Answer,
    Inspect,
    Queue,
    QueuedChoice,
    ReadBlocks,
    ReadFailed,
    ReadQueue,
    ReadRequests,
    ReadSteps,
    RecordQuestion,
    RequestDetail,
    RequestInfo,
    Requests,
    StepInfo,
    StepRow,
    Steps,
)

MAX_ROWS = 8192  # of the steps in one answer, which takes some milliseconds
MAX_EXPLAINED = 8  # choices of one answer whose prompts are compared with those of other requests

Choice = tuple[RequestRecord, Request | None]  # the request only while it has not ended

logger = logging.getLogger("lightwell.engine")


class RecordReader:
    """Reads the records of an engine, between its steps."""

    def __init__(self, recorder: Recorder, scheduler: Scheduler, *, caches_prefixes: bool) -> None:
        self.recorder = recorder
        self.scheduler = scheduler
        self.caches_prefixes = caches_prefixes

    def answer(self, question: RecordQuestion) -> Answer:
        """Return the answer to a question. A fault in it does not end the engine."""
        try:
            match question:
                case ReadSteps():
                    return self._steps(question)
                case ReadRequests():
                    return self._requests(question)
                case ReadQueue():
                    return self._queue(question)
                case ReadBlocks():
                    return read_blocks(question, self.scheduler)
        except Exception:
            logger.exception("a question about the engine's records cannot be answered")
            return ReadFailed(question.read_id)

    # Steps.

    def _steps(self, question: ReadSteps) -> Steps:
        steps, limit = self.recorder.steps, question.limit
        after, since = question.after or 0, question.since or 0.0
        if question.after is None and question.since is None:
            latest = _bounded(islice(reversed(steps), limit))
            return Steps(read_id=question.read_id, steps=latest[::-1], num_lost=0, has_more=False)
        later: list[StepRecord] = []
        for step in reversed(steps):
            if step.step_id <= after or step.started < since:
                break
            later.append(step)
        later.reverse()
        num_lost = max(0, self.recorder.last_dropped - after) if later and later[0] is steps[0] else 0
        infos = _bounded(later[:limit])
        return Steps(read_id=question.read_id, steps=infos, num_lost=num_lost, has_more=len(infos) < len(later))

    # The queue.

    def _queue(self, question: ReadQueue) -> Queue:
        """Return the queue as if tenants took turns: the first of each, then the second of each."""
        queues = list(self.scheduler.waiting.by_tenant.values())
        num_ahead, places = 0, []
        for place in range(max(map(len, queues), default=0)):
            if num_ahead >= question.limit:
                break
            turn = sorted((queue[place] for queue in queues if len(queue) > place), key=order_key)
            places += [(request, num_ahead) for request in turn]
            num_ahead += len(turn)
        return Queue(
            read_id=question.read_id,
            now=self.recorder.clock(),
            num_waiting=len(self.scheduler.waiting),
            choices=[_queued(request, num_before) for request, num_before in places[: question.limit]],
        )

    # Requests.

    def _requests(self, question: ReadRequests) -> Requests:
        now = self.recorder.clock()
        matching = [pair for pair in all_choices(self.recorder, self.scheduler) if _matches(*pair, question)]
        if question.id is not None:
            matching = of_one_request(matching)
        shown, has_more = matching[: question.limit], len(matching) > question.limit
        has_details = question.id is not None or question.since is not None
        details = self._details(question, shown) if has_details else repeat(None)
        infos = [_info(*pair, now, detail) for pair, detail in zip(shown, details, strict=False)]
        return Requests(read_id=question.read_id, now=now, requests=infos, has_more=has_more)

    def _details(self, question: ReadRequests, choices: Sequence[Choice]) -> list[RequestDetail | None]:
        """Return the details of choices. Why a prefix was not found is compared with requests of the same tenant."""
        num_explained = MAX_EXPLAINED if question.id is not None and self.recorder.keeps_tokens else 0
        others = [
            (other, other.token_ids or () if request is None else request.token_ids)
            for other, request in (all_choices(self.recorder, self.scheduler) if num_explained else ())
            if question.tenant in (None, other.tenant)
        ]
        block_size = self.scheduler.pool.block_size
        details: list[RequestDetail | None] = []
        for number, (record, request) in enumerate(choices):
            token_ids = record.token_ids if request is None else request.token_ids
            known_ids = token_ids if number < num_explained else None
            prefix = explain_prefix(record, known_ids, others, self.caches_prefixes, block_size)
            details.append(RequestDetail(chunks=record.chunks, prefix=prefix))
        return details


def all_choices(recorder: Recorder, scheduler: Scheduler) -> Iterator[Choice]:
    """Yield the records of all choices, each with its request while that has not ended; the latest first."""
    living = sorted(scheduler.requests(), key=lambda request: request.record.queued, reverse=True)
    for request in living:
        yield request.record, request
    for record in reversed(recorder.requests):
        yield record, None


def of_one_request(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices of the latest of several requests, in order."""
    if not choices:
        return []
    latest = max((record for record, _ in choices), key=lambda record: record.queued)
    own = [pair for pair in choices if (pair[0].ids, pair[0].arrival) == (latest.ids, latest.arrival)]
    return sorted(own, key=lambda pair: (pair[0].prompt, pair[0].index))


def _bounded(steps: Iterable[StepRecord]) -> list[StepInfo]:
    """Return the first steps, at least one, that have at most `MAX_ROWS` rows together."""
    infos: list[StepInfo] = []
    num_rows = 0
    for step in steps:
        num_rows += len(step.rows)
        if infos and num_rows > MAX_ROWS:
            break
        infos.append(_step_info(step))
    return infos


def _step_info(step: StepRecord) -> StepInfo:
    return StepInfo(
        step_id=step.step_id,
        started=step.started,
        seconds=step.seconds,
        rows=[_row(row) for row in step.rows],
        num_running=step.num_running,
        num_waiting=step.num_waiting,
        num_blocks_used=step.num_blocks_used,
    )


def _row(row: RowRecord) -> StepRow:
    return StepRow(
        *row.request.name,
        row.position,
        row.num_tokens,
        row.is_prompt,
        row.num_generated,
        row.num_drafts,
        row.num_accepted,
    )


def _queued(request: Request, num_ahead: int) -> QueuedChoice:
    record = request.record
    return QueuedChoice(
        *record.name,
        queued=record.preemptions[-1] if record.preemptions else record.queued,
        num_ahead=num_ahead,
        num_tokens=request.num_tokens,
        was_preempted=bool(record.preemptions),
        can_start=request.can_start,
    )


def _state(request: Request | None) -> str:
    if request is None:
        return "finished"
    return "running" if request.status is Status.RUNNING else "waiting"


def has_id(record: RequestRecord, question: ReadRequests | Inspect) -> bool:
    """Return whether a choice is one of a tenant and of a request with an id, if these are asked for."""
    return question.tenant in (None, record.tenant) and (question.id is None or question.id in record.ids)


def _matches(record: RequestRecord, request: Request | None, question: ReadRequests) -> bool:
    return (
        has_id(record, question)
        and question.lora_name in (None, record.lora_name)
        and question.state in (None, _state(request))
        and (question.since is None or record.finished is None or record.finished >= question.since)
    )


def _info(
    record: RequestRecord, request: Request | None, now: float, detail: RequestDetail | None = None
) -> RequestInfo:
    return RequestInfo(
        ids=record.ids or (record.request_id,),
        prompt=record.prompt,
        index=record.index,
        tenant=record.tenant,
        lora_name=record.lora_name,
        state=_state(request),
        finish_reason=record.finish_reason,
        times=record.times(),
        num_blocks=0 if request is None else request.kv.num_blocks,
        detail=detail,
    )
