"""Answers that come in pieces, and handlers that stop when nobody listens any more."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from server.http.errors import APIError, ServerError, error_event

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0

T = TypeVar("T")


class EventStream(EventSourceResponse):
    """Server-sent events that are framed already.

    However it ends, `on_close` is called: a generator that was never started does not run its `finally`, and a client
    may be gone before the first event.
    """

    def __init__(
        self, events: AsyncIterator[bytes], on_close: Callable[[], None] | None, headers: Mapping[str, str] | None
    ) -> None:
        super().__init__(events, headers=headers, ping=KEEP_ALIVE_SECONDS, ping_message_factory=_keep_alive, sep="\n")
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._on_close is not None:
                self._on_close()

    async def _listen_for_exit_signal_with_grace(self) -> None:
        """A stream outlives SIGTERM until it is drained; the server ends it through its events."""
        await anyio.sleep_forever()


def sse_response(
    events: AsyncGenerator[bytes, None],
    *,
    on_close: Callable[[], None] | None = None,
    on_error: Callable[[APIError], bytes] = error_event,
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
) -> EventStream:
    """Streams chunks of whole `data: ...\\n\\n` frames, with a comment now and then while there are none.

    When the client goes away the generator is closed, which must end its request; `on_close` is called in any case,
    also where the generator has never run, and may be called after it. An exception ends the stream with what
    `on_error` makes of it.
    """
    return EventStream(_with_error_event(events, on_error, request_id), on_close, headers)


async def _with_error_event(
    events: AsyncGenerator[bytes, None], on_error: Callable[[APIError], bytes], request_id: str | None
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(events):
            async for chunk in events:
                yield chunk
    except APIError as error:
        yield on_error(error)
    except Exception:
        logger.exception("a stream failed", extra={"request_id": request_id})
        yield on_error(ServerError(request_id))


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")


async def run_until_disconnect(request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; if the client goes away first it is cancelled, and ClientDisconnect raised.

    Only after the request's body has been read.
    """
    work = asyncio.create_task(coroutine)
    watch = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
