"""Answers: as JSON, and as streams of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.errors import APIError, ServerError
from server.shares import MemoryShare

logger = logging.getLogger(__name__)

SLICE_BYTES = 64 << 10
KEEP_ALIVE_SECONDS = 15.0
COMMENT = b": keep-alive\n\n"


class StructResponse(Response):
    """A JSON response whose content is a msgspec struct, or any other value that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class AnswerResponse(Response):
    """A JSON answer that counts in its share until it is sent. If it has to make room, the connection is closed."""

    def __init__(self, content: bytes, share: MemoryShare, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers=headers, media_type="application/json")
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and release its share. Raises the error that has refused the answer meanwhile, if any."""
        try:
            self._share.check()
            async with asyncio.timeout(None) as deadline:

                def stop(error: APIError) -> None:
                    deadline.reschedule(0)

                self._share.end = stop
                await self._send(send)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            self._share.release()

    async def _send(self, send: Send) -> None:
        """Send slices, each of which waits until the client has read most of those before."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), SLICE_BYTES):
            end = start + SLICE_BYTES
            more = end < len(self.body)
            await send({"type": "http.response.body", "body": bytes(self.body[start:end]), "more_body": more})


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
