"""Answers questions about the engine's records and state. Nothing here runs unless somebody asks. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest

from engine.parts.inspection.blocks import read_blocks
from engine.parts.inspection.prefix import explain_prefix
from engine.parts.inspection.recorder import Recorder, notes_of, shown_id
from engine.parts.inspection.records import (
    Answer,
    ChoiceDetail,
    ChunkView,
    Inspect,
    PreemptionView,
    PrefixView,
    QueuedChoiceView,
    QueueList,
    ReadBlocks,
    ReadQueue,
    ReadRequests,
    ReadSteps,
    RecordQuestion,
    RequestInfo,
    Requests,
    Stages,
    State,
    StepList,
    StepView,
)
from engine.scheduling.fair_queue import order_key
from engine.scheduling.record import RequestRecord
from engine.scheduling.request import Request, Status
from engine.shared.messages import RequestTimes

MAX_ROWS = 8192  # of the steps in one answer, which takes some milliseconds
MAX_EXPLAINED = 8  # choices of one answer whose prompts are compared with those of other requests

Choice = tuple[RequestRecord, Request | None]  # the request only while it has not ended

logger = logging.getLogger("lightwell.engine")


class RecordReader:
    """Reads the records of an engine, between its steps."""

    def __init__(self, recorder: Recorder, *, caches_prefixes: bool) -> None:
        self.recorder = recorder
        self.scheduler = recorder.scheduler
        self.caches_prefixes = caches_prefixes

    def answer(self, question: RecordQuestion) -> Answer | None:
        """Return the answer to a question. A fault in it, for which there is none, does not end the engine."""
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
            return None

    # Steps.

    def _steps(self, question: ReadSteps) -> StepList:
        steps, limit = self.recorder.steps, question.limit
        after, since = question.after or 0, question.since or 0.0
        num_lost, has_more = 0, False
        if question.after is None and question.since is None:
            shown = _bounded(islice(reversed(steps), limit))[::-1]
        else:
            later: list[StepView] = []
            for step in reversed(steps):
                if step.id <= after or step.started < since:
                    break
                later.append(step)
            later.reverse()
            num_lost = max(0, self.recorder.last_dropped - after) if later and later[0] is steps[0] else 0
            shown = _bounded(later[:limit])
            has_more = len(shown) < len(later)
        num_blocks = self.scheduler.pool.num_blocks
        return StepList(engine="", num_blocks=num_blocks, num_lost=num_lost, has_more=has_more, data=shown)

    # The queue.

    def _queue(self, question: ReadQueue) -> QueueList:
        """Return the queue as if tenants took turns: the first of each, then the second of each."""
        queues = list(self.scheduler.waiting.by_tenant.values())
        num_ahead, places = 0, []
        for place in range(max(map(len, queues), default=0)):
            if num_ahead >= question.limit:
                break
            turn = sorted((queue[place] for queue in queues if len(queue) > place), key=order_key)
            places += [(request, num_ahead) for request in turn]
            num_ahead += len(turn)
        now, shown = self.scheduler.clock(), places[: question.limit]
        return QueueList(
            num_waiting=len(self.scheduler.waiting),
            data=[_queued(request, num_before, now) for request, num_before in shown],
        )

    # Requests.

    def _requests(self, question: ReadRequests) -> Requests:
        now = self.scheduler.clock()
        matching = [pair for pair in all_choices(self.recorder) if _matches(*pair, question)]
        if question.id is not None:
            matching = of_one_request(matching)
        shown, has_more = matching[: question.limit], len(matching) > question.limit
        has_details = question.id is not None or question.since is not None
        infos = [
            RequestInfo(choice_detail(record, request, now, prefix, has_chunks=has_details), record.times())
            for (record, request), prefix in zip(shown, self._prefixes(question, shown), strict=True)
        ]
        return Requests(now=now, requests=infos, has_more=has_more)

    def _prefixes(self, question: ReadRequests, choices: Sequence[Choice]) -> Iterator[PrefixView]:
        """Yield the prefix of each choice. Why it was not found is compared with requests of the same tenant."""
        num_explained = MAX_EXPLAINED if question.id is not None and self.recorder.keeps_tokens else 0
        others = [
            (other, _token_ids(other, request) or ())
            for other, request in (all_choices(self.recorder) if num_explained else ())
            if question.tenant in (None, other.submit.tenant)
        ]
        block_size = self.scheduler.pool.block_size
        for number, (record, request) in enumerate(choices):
            known_ids = _token_ids(record, request) if number < num_explained else None
            yield explain_prefix(record, known_ids, others, self.caches_prefixes, block_size)


def _token_ids(record: RequestRecord, request: Request | None) -> Sequence[int] | None:
    return request.token_ids if request is not None else notes_of(record).token_ids


def all_choices(recorder: Recorder) -> Iterator[Choice]:
    """Yield the records of all choices, each with its request while that has not ended; the latest first."""
    living = sorted(recorder.scheduler.requests(), key=lambda request: request.record.queued, reverse=True)
    for request in living:
        yield request.record, request
    for record in reversed(recorder.requests):
        yield record, None


def of_one_request(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices of the latest of several requests, in order."""
    if not choices:
        return []
    latest = max((record for record, _ in choices), key=lambda record: record.queued)
    own = [pair for pair in choices if _names(pair[0]) == _names(latest)]
    return sorted(own, key=lambda pair: (pair[0].submit.prompt, pair[0].index))


def _names(record: RequestRecord) -> tuple[tuple[str, ...], float]:
    return record.submit.ids, record.submit.arrival


def _bounded(steps: Iterable[StepView]) -> list[StepView]:
    """Return the first steps, at least one, that have at most `MAX_ROWS` rows together."""
    bounded: list[StepView] = []
    num_rows = 0
    for step in steps:
        num_rows += len(step.rows)
        if bounded and num_rows > MAX_ROWS:
            break
        bounded.append(step)
    return bounded


def _queued(request: Request, num_ahead: int, now: float) -> QueuedChoiceView:
    record = request.record
    return QueuedChoiceView(
        id=shown_id(record),
        prompt=record.submit.prompt,
        index=record.index,
        key=record.submit.tenant,
        waited=now - (record.preemptions[-1] if record.preemptions else record.queued),
        num_ahead=num_ahead,
        num_tokens=request.num_tokens,
        was_preempted=bool(record.preemptions),
        can_start=request.can_start,
    )


def _state(request: Request | None) -> State:
    if request is None:
        return "finished"
    return "running" if request.status is Status.RUNNING else "waiting"


def has_id(record: RequestRecord, question: ReadRequests | Inspect) -> bool:
    """Return whether a choice is one of a tenant and of a request with an id, if these are asked for."""
    submit = record.submit
    return question.tenant in (None, submit.tenant) and (question.id is None or question.id in submit.ids)


def _matches(record: RequestRecord, request: Request | None, question: ReadRequests) -> bool:
    return (
        has_id(record, question)
        and question.lora_name in (None, record.submit.lora_name)
        and question.state in (None, _state(request))
        and (question.since is None or record.finished is None or record.finished >= question.since)
    )


def stages(times: RequestTimes, now: float) -> Stages:
    """Return the stages of a choice until `now`, or until its end."""
    end = now if times.finished is None else times.finished
    scheduled = end if times.scheduled is None else times.scheduled
    first_token = end if times.first_token is None else times.first_token
    before, after = times.preempted(end)
    return Stages(
        tokenizing=times.queued - times.arrival,
        queue=scheduled - times.queued,
        prefill=first_token - scheduled - before,
        decode=end - first_token - after,
        preempted=before + after,
    )


def choice_detail(
    record: RequestRecord, request: Request | None, now: float, prefix: PrefixView, *, has_chunks: bool
) -> ChoiceDetail:
    submit = record.submit
    id, *other_ids = submit.ids or (submit.request_id,)
    return ChoiceDetail(
        id=id,
        other_ids=other_ids,
        prompt=submit.prompt,
        index=record.index,
        key=submit.tenant,
        model=submit.lora_name,
        state=_state(request),
        finish_reason=record.finish_reason,
        arrival=record.arrival,
        wall_s=(now if record.finished is None else record.finished) - record.arrival,
        seconds=stages(record, now),
        first_token=record.first_token,
        finished=record.finished,
        num_ahead=record.num_ahead,
        num_prompt_tokens=record.num_prompt_tokens,
        num_cached_tokens=record.num_cached_tokens,
        num_output_tokens=record.num_output_tokens,
        num_accepted_tokens=record.num_accepted_tokens,
        num_preemptions=record.num_preemptions,
        num_chunks=len(record.chunks),
        num_blocks=0 if request is None else request.kv.num_blocks,
        engine=0,
        chunks=[ChunkView(step=step, position=start, num_tokens=num) for step, start, num in record.chunks]
        if has_chunks
        else [],
        preemptions=[
            PreemptionView(at=at, resumed=resumed)
            for at, resumed in zip_longest(record.preemptions, record.resumptions)
        ],
        prefix=prefix,
    )
