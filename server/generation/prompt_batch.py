"""Runs many prompts of one request in the engine, for endpoints that do not stream: embeddings, scores."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import msgspec
from fastapi import Request

from engine.shared.messages import FinishReason, Submit, TokenEvent
from server.context import get_context
from server.engine_client.answer_budget import AnswerShare, least_embedding_bytes, too_large_error
from server.engine_client.reservation import Reservation
from server.engine_client.streams import RequestStream
from server.generation.timings import ChoiceEnd
from server.http.errors import ServerError
from server.http.json_response import AnswerResponse
from server.http.request_middleware import LOG_FIELDS
from server.models.served_model import ServedModel
from server.schemas.request_fields import QueueFields
from server.tenants import get_tenant


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """The last event of each prompt, in order, and when they were sent to the engine and ended."""

    events: list[TokenEvent]
    endings: list[ChoiceEnd]
    num_prompt_tokens: int
    submitted: float  # seconds of time.monotonic()

    @property
    def last_end(self) -> ChoiceEnd:
        return max(self.endings, key=lambda ending: (ending.times and ending.times.finished) or ending.received)


async def answer_prompts(
    request: Request,
    model: ServedModel,
    body: QueueFields,
    make_submits: Callable[[], Sequence[Submit]],
    num_prompts: int,
    *,
    param: str,
    write: Callable[[PromptBatch], bytes],
    headers: Mapping[str, str],
) -> AnswerResponse:
    """Run prompts that end with their first event, and answer with what they led to, which counts until it is sent.

    If cancelled, abort the prompts in the engine.

    Args:
        make_submits: makes the `num_prompts` prompts; runs in a thread after capacity for them is reserved.
        param: the field that holds the prompts, for errors.
        write: makes the content of the answer; runs in a thread.
        headers: those of the answer.

    Raises APIError.
    """
    context = get_context(request)
    # Reserve no more capacity than the engine can use at a time.
    size = min(num_prompts, model.client.max_num_seqs, model.client.max_in_flight)
    tenant, timeout = get_tenant(request), body.queue_timeout
    with await model.client.admit(size, param=param, tenant=tenant, queue_timeout=timeout) as reservation:
        too_large = partial(too_large_error, param, "answer", context.answers.max_bytes)
        share = reservation.answer = AnswerShare(context.answers, tenant, reservation.fail, too_large)
        try:
            batch = await _run_prompts(request, model, make_submits, reservation, size)
            content = await context.run_text_work(request, write, batch)
        except BaseException:
            share.release()
            raise
    return AnswerResponse(content, share, headers)


async def _run_prompts(
    request: Request,
    model: ServedModel,
    make_submits: Callable[[], Sequence[Submit]],
    reservation: Reservation,
    size: int,
) -> PromptBatch:
    """Run prompts, up to `size` at a time."""
    context = get_context(request)
    events: list[TokenEvent] = []
    endings: list[ChoiceEnd] = []
    made = await context.run_text_work(request, make_submits)
    ids = (request.state.request_id,)
    submits = [msgspec.structs.replace(submit, ids=ids, prompt=number) for number, submit in enumerate(made)]
    share = reservation.answer
    if share is not None and least_embedding_bytes(submits, model.config.hidden_size) > context.answers.max_bytes:
        raise share.too_large()
    submitted = time.monotonic()
    while len(events) < len(submits):
        waiting = submits[len(events) :]
        num_ready = reservation.count or await model.client.refill(reservation, min(size, len(waiting)))
        for event, ending in await _run(model, waiting[:num_ready], reservation, request.state.request_id):
            events.append(event)
            endings.append(ending)
    num_prompt_tokens = sum(len(submit.prompt_token_ids) for submit in submits)
    request.scope["state"][LOG_FIELDS] = lambda: {"prompt_tokens": num_prompt_tokens}
    return PromptBatch(events, endings, num_prompt_tokens, submitted)


async def _run(
    model: ServedModel, submits: Sequence[Submit], reservation: Reservation, request_id: str
) -> list[tuple[TokenEvent, ChoiceEnd]]:
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(model.client.submit(submit, reservation)) for submit in submits]
        return [await _read(stream, request_id) for stream in streams]


async def _read(stream: RequestStream, request_id: str) -> tuple[TokenEvent, ChoiceEnd]:
    """Return the last event of a prompt, and how it ended. Raises ServerError if it failed."""
    events = [event async for batch in stream for event in batch]
    received = time.monotonic()
    if not events or any(event.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP) for event in events):
        raise ServerError(request_id)
    last = events[-1]
    return last, ChoiceEnd(last.times, num_output_tokens=len(last.token_ids), received=received, detokenized=received)
