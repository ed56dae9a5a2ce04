"""`GET /lightwell/v1/events`: the engine's steps as they happen.

A stream asks for what is new since its last event when the client has taken that one. A client that is slow asks later,
so nothing is stored for it: what the engine no longer has by then is lost, and the next event says how much.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Header, Request, Response

from engine.shared.records import ReadSteps, Steps
from server.http.error_formats import ErrorFormat
from server.http.errors import APIError, InvalidValueError
from server.http.json_route import end_with_client
from server.http.responses import EventStream
from server.parts.inspection.access import EngineNumber, RecordAccess, check_may_read
from server.parts.inspection.routes import MAX_STEPS, step_list

INTERVAL = 0.1  # seconds between events, at least
MAX_READERS = 32
MAX_READERS_EACH = 8  # of a tenant

_EVENT_ID = re.compile(r"(\d{1,15}(?:-\d{1,15}){1,2})-(\d{1,15})", re.ASCII)  # engine, step

router = APIRouter(dependencies=[Depends(check_may_read)])


@router.get("/lightwell/v1/events")
async def stream_steps(
    request: Request,
    last_event_id: Annotated[str | None, Header(description="Go on after the event with this id.")] = None,
    engine: EngineNumber = 0,
) -> Response:
    """Stream the steps of the engine from now on, in batches like those of `/lightwell/v1/steps`."""
    access = RecordAccess(request, engine)
    position = await _latest(access) if last_event_id is None else _parse(last_event_id)
    readers, name = access.context.num_step_readers, access.tenant.name
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
    answer = await access.ask(ReadSteps(limit=1))
    assert isinstance(answer, Steps)
    return access.engine_id, answer.steps[-1].step_id if answer.steps else 0


def _parse(event_id: str) -> tuple[str, int]:
    """Return the engine and the step that an event ended with. Raises InvalidValueError."""
    match = _EVENT_ID.fullmatch(event_id)
    if match is None:
        message = "Invalid 'last-event-id': expected the id of an earlier event."
        raise InvalidValueError(message, param="last-event-id")
    return match[1], int(match[2])


async def _events(access: RecordAccess, engine: str, after: int) -> AsyncGenerator[bytes, None]:
    """Yield events until the server shuts down, the engine is dead or the client's key is no longer valid.

    Another engine is read from its first step.
    """
    client, records, num_seen = access.model.client, access.engine.records, -1
    while not client.drain_requested.is_set():
        access.check_key()
        if not access.engine.liveness.is_restarting and records.has_room and num_seen != records.num_steps:
            if engine != access.engine_id:
                engine, after = access.engine_id, 0
            num_reported = records.num_steps
            answer = await access.ask(ReadSteps(after=after, limit=MAX_STEPS))
            assert isinstance(answer, Steps)
            if not answer.has_more:
                num_seen = num_reported
            if answer.steps:
                after = answer.steps[-1].step_id
                data = msgspec.json.encode(await access.run(step_list, access, answer))
                yield f"id: {engine}-{after}\ndata: ".encode() + data + b"\n\n"
        await asyncio.sleep(INTERVAL)


def _error_event(error: APIError, num_events: int = 0) -> bytes:
    return b"data: " + error.body() + b"\n\n"


EVENT_ERRORS = ErrorFormat(paths=re.compile("/lightwell/"), last_events=_error_event)
