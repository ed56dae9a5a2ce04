"""Requests that wait until their model is loaded, and why they fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from server.context import get_context
from server.dialect import ModelRoute
from server.http.errors import BadRequestError, EngineUnavailableError
from server.http.responses import KEEP_ALIVE_SECONDS, EventStream
from server.models.registry import ModelSlot
from server.parts.models.slots import LoadableSlot
from server.schemas.generation_request import GenerationRequest
from server.tenants import Tenant, get_tenant

RETRY_SECONDS = 10.0  # after a failure, until the model is loaded again for another request

MAX_HELD_SECONDS = KEEP_ALIVE_SECONDS  # for which the status of a stream waits, so that most errors have their own
COMMENT_SECONDS = 5.0  # between comments to a client that waits for a model

WaitLoaded: TypeAlias = Callable[[LoadableSlot, float, Tenant], Coroutine[Any, Any, None]]  # `ModelManager.wait_loaded`


class ModelLoadError(EngineUnavailableError):
    """A model cannot be loaded. An empty reason is not shown, since it may name files."""

    def __init__(self, name: str, reason: str) -> None:
        message = f"The model `{name}` cannot be loaded" + (f": {reason}." if reason else ".")
        super().__init__(message, code="model_load_failed", retry_after=RETRY_SECONDS)


class LoadTimeoutError(EngineUnavailableError):
    """A model was not loaded in the time that a request may wait."""

    def __init__(self, name: str, seconds: float) -> None:
        message = f"The model `{name}` is still being loaded. The request waited for {seconds:g} seconds, its limit."
        super().__init__(message, code="request_timeout")


async def respond(wait_loaded: WaitLoaded, route: ModelRoute, request: Request, fields: dict[str, Any]) -> Response:
    """Answer a request for a model once it is loaded. While it is, a stream of server-sent events has comments."""
    seconds = patience(request, fields.get("queue_timeout"))
    is_stream = route.errors is not None and fields.get("stream") is True
    slot = find_slot(route, request, fields) if is_stream or seconds is not None else None
    if not is_stream or slot is None or slot.served is not None or (seconds or 0.0) <= MAX_HELD_SECONDS:
        async with loaded(wait_loaded, request, None if seconds is None else slot, seconds or 0.0):
            return await route.respond_loaded(request, fields)
    assert seconds is not None
    assert route.errors is not None
    errors = route.errors
    with ExitStack() as stack:
        stack.enter_context(slot.in_use())
        try:
            await wait_loaded(slot, MAX_HELD_SECONDS, get_tenant(request))
        except LoadTimeoutError:
            return EventStream(
                _events(wait_loaded, route, request, fields, slot, seconds),
                on_close=stack.pop_all().close,
                on_error=lambda error: errors.last_events(error, 0),
                request_id=request.state.request_id,
            )
        return await route.respond_loaded(request, fields)


async def _events(
    wait_loaded: WaitLoaded,
    route: ModelRoute,
    request: Request,
    fields: dict[str, Any],
    slot: LoadableSlot,
    seconds: float,
) -> AsyncGenerator[bytes, None]:
    """Yield comments until the model is loaded, then the events of the stream that the handler returns."""
    waiting = asyncio.create_task(wait_loaded(slot, seconds - MAX_HELD_SECONDS, get_tenant(request)))
    try:
        while not waiting.done():
            yield _comment(slot)
            await asyncio.wait([waiting], timeout=COMMENT_SECONDS)
        waiting.result()
    finally:
        waiting.cancel()
    response = await route.respond_loaded(request, fields)  # they are valid, else it would not have waited
    assert isinstance(response, EventStream)
    async with aclosing(response.events()) as events:
        async for chunk in events:
            yield chunk


def find_slot(route: ModelRoute, request: Request, fields: dict[str, Any]) -> LoadableSlot | None:
    """Return the model that a request names, or None if its handler will refuse it.

    Raises BadRequestError for fields that are valid, but not together.
    """
    name = next((fields[field] for field in route.name_fields if fields.get(field) is not None), None)
    models, slot = get_context(request).models, None
    if isinstance(name, str):
        slot = models.find_slot(route.served_name(request, name), get_tenant(request))
    elif name is None and len(models.slots) == 1:
        slot = models.slots[0]
    if not isinstance(slot, LoadableSlot):
        return None
    return slot if slot.served is not None or _is_valid(route, fields) else None


def _is_valid(route: ModelRoute, fields: dict[str, Any]) -> bool:
    """Return whether the fields are valid: no model is loaded, and none makes room, for a request that is not."""
    try:
        parsed = route.validate(fields)
    except BadRequestError:
        return False
    if isinstance(parsed, GenerationRequest):
        parsed.check()
    return True


@asynccontextmanager
async def loaded(
    wait_loaded: WaitLoaded, request: Request, slot: ModelSlot | None, seconds: float
) -> AsyncGenerator[None, None]:
    """Wait until a model is loaded, at most `seconds`, and keep it loaded in the context. None: there is none.

    Raises APIError if it cannot be loaded in time.
    """
    if not isinstance(slot, LoadableSlot):
        yield
        return
    with slot.in_use():
        if slot.served is None:
            await wait_loaded(slot, seconds, get_tenant(request))
        yield


def patience(request: Request, queue_timeout: object = None) -> float | None:
    """Return the seconds that a request may wait for its model. None: its own `queue_timeout` is invalid."""
    settings = get_context(request).settings
    limits = [limit for limit in (settings.queue_timeout, settings.request_timeout) if limit]
    if queue_timeout is None:
        return min(limits)
    if isinstance(queue_timeout, bool) or not isinstance(queue_timeout, int | float) or not queue_timeout > 0:
        return None
    return min([*limits, queue_timeout])


def _comment(slot: LoadableSlot) -> bytes:
    """Return a comment that says how far the load is."""
    fraction = slot.fraction_loaded
    done = "" if fraction is None else f", {fraction:.0%}"
    return f": loading {slot.name}, {slot.seconds_loading or 0.0:.0f} s{done}\n\n".encode()
