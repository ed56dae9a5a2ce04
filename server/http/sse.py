"""Streams of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from server.http.errors import APIError, ServerError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
COMMENT = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """How the events of a stream are delimited."""

    media_type: str
    has_comments: bool  # which keep idle connections open


SERVER_SENT_EVENTS = StreamFormat("text/event-stream", has_comments=True)
NDJSON = StreamFormat("application/x-ndjson", has_comments=False)  # a JSON object per line


def error_event(error: APIError) -> bytes:
    """Return the last events of a stream that failed: the error and `[DONE]`."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


class EventStream(EventSourceResponse):
    """A response of chunks of events that are already encoded, with comments in pauses if the format has any.

    The client's disconnect must cancel the handler: `StrictJSONRoute` sees to that, other handlers call
    `end_with_client`. Then the generator is closed, which must abort its work. An exception ends the stream with the
    events that `on_error` returns for it. At the end, `on_close` is always called: the `finally` of a generator does
    not run if the client disconnects before the first event, so that the generator never starts.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        on_close: Callable[[], None] | None = None,
        on_error: Callable[[APIError], bytes] = error_event,
        headers: Mapping[str, str] | None = None,
        request_id: str | None = None,
        format: StreamFormat = SERVER_SENT_EVENTS,
    ) -> None:
        super().__init__(chunks, headers=headers, media_type=format.media_type)
        self._chunks = chunks
        self._on_close = on_close
        self._on_error = on_error
        self._request_id = request_id
        self._has_comments = format.has_comments
        self._comments: asyncio.Task[None] | None = None  # that sends them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._begin_comments, send)
        has_failed = False
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not has_failed:
                try:
                    chunk = await anext(self._chunks)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    chunk, has_failed = self._last_events(error), True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._end_comments(timer)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._end_comments(timer)
            await self._close()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the chunks, for another stream that they become a part of."""
        try:
            async for chunk in self._chunks:
                yield chunk
        except Exception as error:
            yield self._last_events(error)
        finally:
            await self._close()

    def _last_events(self, error: Exception) -> bytes:
        if isinstance(error, APIError):
            return self._on_error(error.with_traceback(None))
        logger.error("a stream failed", exc_info=error, extra={"request_id": self._request_id})
        return self._on_error(ServerError(self._request_id))

    async def _close(self) -> None:
        try:
            await self._chunks.aclose()
        finally:
            if self._on_close is not None:
                self._on_close()

    def _begin_comments(self, send: Send) -> None:
        if self._has_comments:
            self._comments = asyncio.create_task(_send_comments(send))

    def _end_comments(self, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        if self._comments is not None:
            self._comments.cancel()


async def _send_comments(send: Send) -> None:
    while True:
        await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
        await asyncio.sleep(KEEP_ALIVE_SECONDS)
