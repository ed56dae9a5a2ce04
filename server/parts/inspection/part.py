"""`/lightwell/v1/`: what the engine does, read from its records. No text of prompts or answers is in them."""

import asyncio
import math
import re
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Depends, Header, Query, Request, Response

from engine.parts.inspection import records
from engine.shared.machine import available_memory
from engine.shared.messages import EngineInfo
from server.context import ServerContext
from server.dialect import BEGINNING, Dialect, Operation
from server.http.error_formats import ErrorFormat
from server.http.errors import APIError, invalid
from server.http.responses import EventStream, StructResponse
from server.http.strict_json import end_with_client
from server.part import Part
from server.parts.inspection import inspect, trace
from server.parts.inspection.access import EngineNumber, RecordAccess, check_may_read, read_request
from server.parts.inspection.inspect import Inspection
from server.parts.inspection.trace import Trace

MAX_STEPS = 1024
MAX_REQUESTS = 1024
MAX_BLOCKS = 1 << 14  # the engine needs some milliseconds for these

INTERVAL = 0.1  # seconds between events, at least
MAX_READERS = 32
MAX_READERS_EACH = 8  # of a tenant

_EVENT_ID = re.compile(r"(\d{1,15}(?:-\d{1,15}){1,2})-(\d{1,15})", re.ASCII)  # engine, step

router = APIRouter(dependencies=[Depends(check_may_read)])


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of the engine, and how its memory is divided."""

    object: Literal["engine"] = "engine"
    engine: str  # changes when the engine is restarted
    device: str
    dtype: str
    kernels: str
    deterministic: bool  # a request gets the same answer, bit for bit, in any batch
    max_model_len: int  # tokens of a prompt and its answer
    max_num_seqs: int  # choices in the batch
    max_num_batched_tokens: int  # of a step
    block_size: int  # tokens
    num_blocks: int  # of the KV cache
    weight_bytes: int
    kv_cache_bytes: int  # of all blocks and states
    num_states: int  # of choices and snapshots, in models that have states
    state_bytes: int  # of one
    activation_bytes: int  # of the largest step; 0: not measured
    num_engines: int  # with --data-parallel-size
    available_bytes: int  # memory of the host that is free now


class RequestList(msgspec.Struct, frozen=True, kw_only=True):
    """Choices: those that have not ended, and then those that have, each the latest first."""

    object: Literal["list"] = "list"
    has_more: bool
    data: list[records.RequestView]


class RequestDetails(msgspec.Struct, frozen=True, kw_only=True):
    """One request with its choices."""

    object: Literal["request"] = "request"
    id: str
    has_more: bool  # there are more choices
    choices: list[records.ChoiceDetail]


@router.get("/lightwell/v1/engine")
async def describe_engine(request: Request, engine: EngineNumber = 0) -> Response:
    """Return the limits of the engine, and how its memory is divided."""
    access = RecordAccess(request, engine)
    return await access.respond(_engine_view, access, access.engine.liveness.ready_info())


def _engine_view(access: RecordAccess, info: EngineInfo) -> EngineView:
    """Return the engine's limits."""
    shared = {name: getattr(info, name) for name in EngineView.__struct_fields__ if name in info.__struct_fields__}
    num_engines = len(access.model.client.engines)
    return EngineView(engine=access.engine_id, num_engines=num_engines, available_bytes=available_memory(), **shared)


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
    answer = await access.ask(records.ReadSteps(after=after, limit=limit), records.StepList)
    return await access.respond(show_steps, access, answer)


def show_steps(access: RecordAccess, steps: records.StepList) -> records.StepList:
    """Return what a client sees of some steps: those of other clients' rows have no names."""
    steps.engine, offset = access.engine_id, access.questions.clock_offset
    for step in steps.data:
        step.started += offset
        for row in step.rows:
            if not access.show_choice(row):
                row.position = None
    return steps


@router.get("/lightwell/v1/queue")
async def list_queue(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_REQUESTS, description="Maximum number of choices.")] = 100,
    engine: EngineNumber = 0,
) -> Response:
    """Return the choices that wait for a slot or for KV blocks, the next ones first."""
    access = RecordAccess(request, engine)
    queue = await access.ask(records.ReadQueue(limit=limit), records.QueueList)
    for choice in queue.data:
        access.show_choice(choice)
    return await access.respond(lambda: queue)


@router.get("/lightwell/v1/blocks")
async def list_blocks(
    request: Request,
    start: Annotated[int, Query(ge=0, le=1 << 53, description="Number of the first block.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_BLOCKS, description="Maximum number of blocks.")] = MAX_BLOCKS,
    engine: EngineNumber = 0,
) -> Response:
    """Return which blocks of the KV cache are held by which choices, cached or free."""
    access = RecordAccess(request, engine)
    blocks = await access.ask(records.ReadBlocks(tenant=access.own_name, start=start, limit=limit), records.BlockMap)
    blocks.engine = access.engine_id
    for owner in blocks.owners:
        owner.key = access.key_name(owner.key or "")
    return await access.respond(lambda: blocks)


@router.get("/lightwell/v1/requests")
async def list_requests(
    request: Request,
    state: Annotated[records.State | None, Query(description="Only choices in this state.")] = None,
    model: Annotated[str | None, Query(description="Only choices of this model or LoRA adapter.")] = None,
    key: Annotated[str | None, Query(description="Only choices of the client with this name.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_REQUESTS, description="Maximum number of choices.")] = 100,
) -> Response:
    """Return the choices that wait or run, and the last 1,024 that have ended."""
    access = RecordAccess(request)
    if key is not None and (not access.has_keys or not access.may_see(key)):
        return StructResponse(RequestList(has_more=False, data=[]))
    question = records.ReadRequests(
        tenant=access.own_name if key is None else key,
        state=state,
        lora_name="" if model in access.model.names else model,
        limit=limit,
    )
    answers = [(each, await each.ask(question, records.Requests)) for each in access.of_all_engines()]
    return await access.respond(_request_list, answers, limit)


def _request_list(answers: Sequence[tuple[RecordAccess, records.Requests]], limit: int) -> RequestList:
    """Return the choices of all engines: those that have not ended, and then those that have, the latest first."""
    details = [access.show_request(info) for access, answer in answers for info in answer.requests]
    data = [msgspec.convert(detail, records.RequestView, from_attributes=True) for detail in details]
    if len(answers) > 1:
        data.sort(key=lambda view: -math.inf if view.finished is None else -view.finished)
    has_more = len(data) > limit or any(answer.has_more for _, answer in answers)
    return RequestList(has_more=has_more, data=data[:limit])


@router.get("/lightwell/v1/requests/{request_id}")
async def retrieve_request(request: Request, request_id: str) -> Response:
    """Return what happened to the latest request with this id: that of its answer, or its x-request-id."""
    access, answer = await read_request(RecordAccess(request), request_id)
    return await access.respond(_request_details, access, answer)


def _request_details(access: RecordAccess, answer: records.Requests) -> RequestDetails:
    choices = list(map(access.show_request, answer.requests))
    return RequestDetails(id=choices[0].id, has_more=answer.has_more, choices=choices)


# The steps as they happen. A stream asks for what is new since its last event when the client has taken that one. A
# client that is slow asks later, so nothing is stored for it: what the engine no longer has by then is lost, and the
# next event says how much.


class StepReaders(Counter[str]):
    """Streams of steps, by tenant."""


@router.get("/lightwell/v1/events")
async def stream_steps(
    request: Request,
    last_event_id: Annotated[str | None, Header(description="Go on after the event with this id.")] = None,
    engine: EngineNumber = 0,
) -> Response:
    """Stream the steps of the engine from now on, in batches like those of `/lightwell/v1/steps`."""
    access = RecordAccess(request, engine)
    position = await _latest(access) if last_event_id is None else _parse(last_event_id)
    readers, name = access.context.part(StepReaders), access.tenant.name
    if readers.total() >= MAX_READERS or readers[name] >= MAX_READERS_EACH:
        message = f"Too many streams of steps are open: at most {MAX_READERS}, and {MAX_READERS_EACH} of a client."
        raise APIError(429, message, code="rate_limit_exceeded", headers={"retry-after": "5"})
    readers[name] += 1

    def leave() -> None:
        readers[name] -= 1
        if not readers[name]:
            del readers[name]

    end_with_client(request.scope)
    return EventStream(
        _events(access, *position), on_close=leave, on_error=_error_event, request_id=request.state.request_id
    )


async def _latest(access: RecordAccess) -> tuple[str, int]:
    """Return the engine, and its latest step."""
    steps = (await access.ask(records.ReadSteps(limit=1), records.StepList)).data
    return access.engine_id, steps[-1].id if steps else 0


def _parse(event_id: str) -> tuple[str, int]:
    """Return the engine and the step that an event ended with. Raises InvalidValueError."""
    match = _EVENT_ID.fullmatch(event_id)
    if match is None:
        raise invalid("last-event-id", "expected the id of an earlier event")
    return match[1], int(match[2])


async def _events(access: RecordAccess, engine: str, after: int) -> AsyncGenerator[bytes, None]:
    """Yield events until the server shuts down, the engine is dead or the client's key is no longer valid.

    Another engine is read from its first step.
    """
    client, num_seen = access.model.client, -1
    while not client.drain_requested.is_set():
        access.check_key()
        is_new = num_seen != access.engine.num_steps
        if is_new and not access.engine.liveness.is_restarting and access.questions.has_room:
            if engine != access.engine_id:
                engine, after = access.engine_id, 0
            num_reported = access.engine.num_steps
            steps = await access.ask(records.ReadSteps(after=after, limit=MAX_STEPS), records.StepList)
            if not steps.has_more:
                num_seen = num_reported
            if steps.data:
                after = steps.data[-1].id
                data = msgspec.json.encode(await access.run(show_steps, access, steps))
                yield f"id: {engine}-{after}\ndata: ".encode() + data + b"\n\n"
        await asyncio.sleep(INTERVAL)


def _error_event(error: APIError, num_events: int = 0) -> bytes:
    return b"data: " + error.body() + b"\n\n"


EVENT_ERRORS = ErrorFormat(paths=re.compile("/lightwell/"), last_events=_error_event)


INSPECTION = Dialect(
    tag="Lightwell",
    routers=[router, inspect.router, trace.router],
    operations={
        ("/lightwell/v1/engine", "get"): Operation(EngineView),
        ("/lightwell/v1/steps", "get"): Operation(records.StepList),
        ("/lightwell/v1/events", "get"): Operation(None, events=records.StepList),
        ("/lightwell/v1/queue", "get"): Operation(records.QueueList),
        ("/lightwell/v1/blocks", "get"): Operation(records.BlockMap),
        ("/lightwell/v1/requests", "get"): Operation(RequestList),
        ("/lightwell/v1/requests/{request_id}", "get"): Operation(RequestDetails),
        ("/lightwell/v1/requests/{request_id}/trace", "get"): Operation(Trace),
        ("/lightwell/v1/trace", "get"): Operation(Trace),
        ("/lightwell/v1/inspect", "post"): Operation(Inspection, {"prompt": BEGINNING}, has_model=False),
    },
    errors=EVENT_ERRORS,
    in_workers=False,
)


def _attach(context: ServerContext) -> None:
    context.of_parts[StepReaders] = StepReaders()


PART = Part(dialects=[INSPECTION], attach=_attach)
