"""Streams of events, and handlers that are cancelled when the client disconnects."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from server.http.errors import APIError, ServerError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """How the events of a stream are delimited."""

    media_type: str
    has_comments: bool  # which keep idle connections open


SERVER_SENT_EVENTS = StreamFormat("text/event-stream", has_comments=True)
NDJSON = StreamFormat("application/x-ndjson", has_comments=False)  # a JSON object per line


class EventStream(EventSourceResponse):
    """A response of events that are already encoded.

    It always calls `on_close` at the end. The `finally` of a generator is not enough: it does not run if the client
    disconnects before the first event, so that the generator never starts.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_close: Callable[[], None] | None,
        headers: Mapping[str, str] | None,
        format: StreamFormat = SERVER_SENT_EVENTS,
    ) -> None:
        super().__init__(
            events,
            headers=headers,
            media_type=format.media_type,
            ping=KEEP_ALIVE_SECONDS,
            ping_message_factory=_keep_alive,
            sep="\n",
        )
        self._chunks = events
        self._on_close = on_close
        self._has_comments = format.has_comments

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._on_close is not None:
                self._on_close()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events, for another stream that they become a part of."""
        try:
            async for chunk in self._chunks:
                yield chunk
        finally:
            if self._on_close is not None:
                self._on_close()

    async def _listen_for_exit_signal_with_grace(self) -> None:
        """Keep the stream open on SIGTERM: the server drains it, and ends it through its events."""
        await anyio.sleep_forever()

    async def _ping(self, send: Send) -> None:
        if self._has_comments:
            await super()._ping(send)
        await anyio.sleep_forever()


def error_event(error: APIError) -> bytes:
    """Return the last events of a stream that failed: the error and `[DONE]`."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


def sse_response(
    events: AsyncGenerator[bytes, None],
    *,
    on_close: Callable[[], None] | None = None,
    on_error: Callable[[APIError], bytes] = error_event,
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
    format: StreamFormat = SERVER_SENT_EVENTS,
) -> EventStream:
    """Return a response that streams chunks of complete events, with keep-alive comments in pauses if it has comments.

    When the client disconnects, the generator is closed, which must abort its request. `on_close` is always called,
    even if the generator never ran, and possibly after it. An exception ends the stream with the events that `on_error`
    returns for it.
    """
    return EventStream(_with_error_event(events, on_error, request_id), on_close, headers, format)


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
    """Return the coroutine's result. If the client disconnects first, cancel it and raise ClientDisconnect.

    The request's body must have been read.
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
