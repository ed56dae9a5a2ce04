"""Routes whose requests name a model, which is loaded before their handler runs."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.context import get_context
from server.http.error_formats import OPENAI_ERRORS
from server.http.errors import BadRequestError
from server.http.json_route import StrictJSONRoute
from server.http.sse import KEEP_ALIVE_SECONDS, EventStream
from server.models.slot import ModelSlot
from server.parts.models.manager import LoadTimeoutError, ModelManager
from server.schemas.generation_request import GenerationRequest
from server.tenants import get_tenant

MAX_HELD_SECONDS = KEEP_ALIVE_SECONDS  # for which the status of a stream waits, so that most errors have their own
COMMENT_SECONDS = 5.0  # between comments to a client that waits for a model


class ModelRoute(StrictJSONRoute):
    """A route for JSON bodies that name a model. A request for one that is not loaded waits until it is."""

    name_fields: tuple[str, ...] = ("model",)  # those that may hold the name

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        if get_context(request).model_manager is None:
            return await super().respond(request, fields)
        seconds = patience(request, fields.get("queue_timeout"))
        async with loaded(request, None if seconds is None else self.find_slot(request, fields), seconds or 0.0):
            return await super().respond(request, fields)

    def find_slot(self, request: Request, fields: dict[str, Any]) -> ModelSlot | None:
        """Return the model that a request names, or None if its handler will refuse it.

        Raises BadRequestError for fields that are valid, but not together.
        """
        name = next((fields[field] for field in self.name_fields if fields.get(field) is not None), None)
        models, slot = get_context(request).models, None
        if isinstance(name, str):
            slot = models.find_slot(self.served_name(request, name), get_tenant(request))
        elif name is None and len(models.slots) == 1:
            slot = models.slots[0]
        is_loaded = slot is None or slot.served is not None
        return slot if is_loaded or self._is_valid(fields) else None

    def _is_valid(self, fields: dict[str, Any]) -> bool:
        """Return whether the fields are valid: no model is loaded, and none makes room, for a request that is not."""
        try:
            parsed = self.validate(fields)
        except BadRequestError:
            return False
        if isinstance(parsed, GenerationRequest):
            parsed.check()
        return True

    def served_name(self, request: Request, name: str) -> str:
        """Return the name of a served model for the one that the client sent."""
        return name


class StreamRoute(ModelRoute):
    """A route that can answer with server-sent events. While a model is loaded, they are comments."""

    errors = OPENAI_ERRORS

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        manager = get_context(request).model_manager
        if manager is None:
            return await StrictJSONRoute.respond(self, request, fields)
        if fields.get("stream") is not True:
            return await super().respond(request, fields)
        slot = self.find_slot(request, fields)
        seconds = patience(request, fields.get("queue_timeout")) or 0.0
        if slot is None or slot.served is not None or seconds <= MAX_HELD_SECONDS:
            return await super().respond(request, fields)
        with ExitStack() as stack:
            stack.enter_context(slot.in_use())
            try:
                await manager.wait_loaded(slot, MAX_HELD_SECONDS, get_tenant(request))
            except LoadTimeoutError:
                return EventStream(
                    self._events(request, fields, manager, slot, seconds),
                    on_close=stack.pop_all().close,
                    on_error=lambda error: self.errors.last_events(error, 0),
                    request_id=request.state.request_id,
                )
            return await StrictJSONRoute.respond(self, request, fields)

    async def _events(
        self, request: Request, fields: dict[str, Any], manager: ModelManager, slot: ModelSlot, seconds: float
    ) -> AsyncGenerator[bytes, None]:
        """Yield comments until the model is loaded, then the events of the stream that the handler returns."""
        waiting = asyncio.create_task(manager.wait_loaded(slot, seconds - MAX_HELD_SECONDS, get_tenant(request)))
        try:
            while not waiting.done():
                yield _comment(slot)
                await asyncio.wait([waiting], timeout=COMMENT_SECONDS)
            waiting.result()
        finally:
            waiting.cancel()
        response = await StrictJSONRoute.respond(self, request, fields)  # they are valid, else it would not have waited
        assert isinstance(response, EventStream)
        async with aclosing(response.events()) as events:
            async for chunk in events:
                yield chunk


@asynccontextmanager
async def loaded(request: Request, slot: ModelSlot | None, seconds: float) -> AsyncGenerator[None, None]:
    """Wait until a model is loaded, at most `seconds`, and keep it loaded in the context. None: there is none.

    Raises APIError if it cannot be loaded in time.
    """
    manager = get_context(request).model_manager
    if manager is None or slot is None:
        yield
        return
    with slot.in_use():
        if slot.served is None:
            await manager.wait_loaded(slot, seconds, get_tenant(request))
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


def _comment(slot: ModelSlot) -> bytes:
    """Return a comment that says how far the load is."""
    fraction = slot.fraction_loaded
    done = "" if fraction is None else f", {fraction:.0%}"
    return f": loading {slot.name}, {slot.seconds_loading or 0.0:.0f} s{done}\n\n".encode()
