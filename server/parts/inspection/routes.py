"""`/lightwell/v1/`: what the engine does, read from its records. No text of prompts or answers is in them."""

import math
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from engine.shared.records import Blocks, Queue, ReadBlocks, ReadQueue, ReadRequests, ReadSteps, Requests, Steps
from server.http.errors import APIError, clip
from server.http.responses import StructResponse
from server.parts.inspection.access import EngineNumber, RecordAccess, check_may_read
from server.parts.inspection.schemas import QueueList, RequestDetails, RequestList, State, StepList
from server.parts.inspection.views import block_map, choice_detail, engine_view, queued_view, request_view, step_view

MAX_STEPS = 1024
MAX_REQUESTS = 1024
MAX_CHOICES = 128
MAX_BLOCKS = 1 << 14  # the engine needs some milliseconds for these

router = APIRouter(dependencies=[Depends(check_may_read)])


@router.get("/lightwell/v1/engine")
async def describe_engine(request: Request, engine: EngineNumber = 0) -> Response:
    """Return the limits of the engine, and how its memory is divided."""
    access = RecordAccess(request, engine)
    return await access.respond(engine_view, access, access.engine.liveness.ready_info())


@router.get("/lightwell/v1/steps")
async def list_steps(
    request: Request,
    after: Annotated[
        int | None, Query(ge=0, le=1 << 53, description="Only steps after this id. Unset: the latest steps.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_STEPS, description="Maximum number of steps.")] = 100,
    engine: EngineNumber = 0,
) -> Response:
    """Return steps of the engine: how long each part took, and what was computed for which request."""
    access = RecordAccess(request, engine)
    answer = await access.ask(ReadSteps(after=after, limit=limit))
    assert isinstance(answer, Steps)
    return await access.respond(step_list, access, answer)


def step_list(access: RecordAccess, answer: Steps) -> StepList:
    """Return what a client sees of some steps."""
    return StepList(
        engine=access.engine_id,
        num_blocks=access.engine.liveness.ready_info().num_blocks,
        num_lost=answer.num_lost,
        has_more=answer.has_more,
        data=[step_view(access, step) for step in answer.steps],
    )


@router.get("/lightwell/v1/queue")
async def list_queue(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_REQUESTS, description="Maximum number of choices.")] = 100,
    engine: EngineNumber = 0,
) -> Response:
    """Return the choices that wait for a slot or for KV blocks, the next ones first."""
    access = RecordAccess(request, engine)
    answer = await access.ask(ReadQueue(limit=limit))
    assert isinstance(answer, Queue)
    return await access.respond(_queue_list, access, answer)


def _queue_list(access: RecordAccess, answer: Queue) -> QueueList:
    data = [queued_view(access, choice, answer.now) for choice in answer.choices]
    return QueueList(num_waiting=answer.num_waiting, data=data)


@router.get("/lightwell/v1/blocks")
async def list_blocks(
    request: Request,
    start: Annotated[int, Query(ge=0, le=1 << 53, description="Number of the first block.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_BLOCKS, description="Maximum number of blocks.")] = MAX_BLOCKS,
    engine: EngineNumber = 0,
) -> Response:
    """Return which blocks of the KV cache are held by which choices, cached or free."""
    access = RecordAccess(request, engine)
    answer = await access.ask(ReadBlocks(tenant=access.own_name, start=start, limit=limit))
    assert isinstance(answer, Blocks)
    return await access.respond(block_map, access, answer, start + limit)


@router.get("/lightwell/v1/requests")
async def list_requests(
    request: Request,
    state: Annotated[State | None, Query(description="Only choices in this state.")] = None,
    model: Annotated[str | None, Query(description="Only choices of this model or LoRA adapter.")] = None,
    key: Annotated[str | None, Query(description="Only choices of the client with this name.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_REQUESTS, description="Maximum number of choices.")] = 100,
) -> Response:
    """Return the choices that wait or run, and the last 1,024 that have ended."""
    access = RecordAccess(request)
    if key is not None and (not access.has_keys or not access.may_see(key)):
        return StructResponse(RequestList(has_more=False, data=[]))
    question = ReadRequests(
        tenant=access.own_name if key is None else key,
        state=state,
        lora_name="" if model in access.model.names else model,
        limit=limit,
    )
    answers = [(each, await read_requests(each, question)) for each in access.of_all_engines()]
    return await access.respond(_request_list, answers, limit)


async def read_requests(access: RecordAccess, question: ReadRequests) -> Requests:
    """Return an engine's answer. Raises APIError."""
    answer = await access.ask(question)
    assert isinstance(answer, Requests)
    return answer


def _request_list(answers: Sequence[tuple[RecordAccess, Requests]], limit: int) -> RequestList:
    """Return the choices of all engines: those that have not ended, and then those that have, the latest first."""
    data = [request_view(access, info, answer.now) for access, answer in answers for info in answer.requests]
    if len(answers) > 1:
        data.sort(key=lambda view: -math.inf if view.finished is None else -view.finished)
    has_more = len(data) > limit or any(answer.has_more for _, answer in answers)
    return RequestList(has_more=has_more, data=data[:limit])


@router.get("/lightwell/v1/requests/{request_id}")
async def retrieve_request(request: Request, request_id: str) -> Response:
    """Return what happened to the latest request with this id: that of its answer, or its x-request-id."""
    access, answer = await read_request(RecordAccess(request), request_id)
    return await access.respond(_request_details, access, answer)


def _request_details(access: RecordAccess, answer: Requests) -> RequestDetails:
    choices = [choice_detail(access, info, answer.now, info.detail) for info in answer.requests if info.detail]
    return RequestDetails(id=choices[0].id, has_more=answer.has_more, choices=choices)


async def read_request(access: RecordAccess, request_id: str) -> tuple[RecordAccess, Requests]:
    """Return the choices of the latest request with an id, with details, and access to the engine that has them.

    Of a request with several prompts, engines may have one each: the others are left out. Raises APIError if there is
    none.
    """
    question = ReadRequests(tenant=access.own_name, id=request_id, limit=MAX_CHOICES)
    answers = [(each, await read_requests(each, question)) for each in access.of_all_engines()]
    found = [(each, answer) for each, answer in answers if answer.requests]
    if not found:
        message = f"No request with the id '{clip(request_id)}' is running or among the last that have ended."
        raise APIError(404, message, code="request_not_found")
    return max(found, key=lambda pair: pair[1].requests[0].times.arrival)
