"""JSON responses that are not streams."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.errors import APIError

SLICE_BYTES = 64 << 10


class StructResponse(Response):
    """A JSON response whose content is a msgspec struct, or any other value that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class Counted(Protocol):
    """The part of an `AnswerShare` that a response uses."""

    def check(self) -> None:
        """Raise the error that has refused the answer, if one has."""

    def on_refusal(self, refuse: Callable[[APIError], None]) -> None:
        """Replace what ends the request."""

    def release(self) -> None:
        """Count the answer no longer."""


class AnswerResponse(Response):
    """A JSON answer that counts in its share until it is sent. If it has to make room, the connection is closed."""

    def __init__(self, content: bytes, share: Counted, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers=headers, media_type="application/json")
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and release its share. Raises the error that has refused the answer meanwhile, if any."""
        try:
            self._share.check()
            async with asyncio.timeout(None) as deadline:

                def stop(error: APIError) -> None:
                    deadline.reschedule(0)

                self._share.on_refusal(stop)
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
