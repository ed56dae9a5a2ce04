"""Middleware that reads request bodies, with limits on size and time."""

import asyncio

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import APIError, BodyTimeoutError, BodyTooLargeError, UnsupportedMediaTypeError

BODY_TIMEOUT = 60.0  # seconds from the end of a request's head to the end of its body
DISCARD_TIMEOUT = 1.0  # seconds to read the rest of a rejected body, so that the client can read the answer


class BodyMiddleware:
    """Reads the body of a POST request, and passes it to the application in one piece.

    A body over the size limit gets status 413 (by its Content-Length, or as soon as it exceeds the limit), a body that
    does not arrive in time 408; both close the connection. A compressed body gets 415 and is never decompressed.
    """

    def __init__(self, app: ASGIApp, max_body_size: int, timeout: float = BODY_TIMEOUT) -> None:
        self._app = app
        self._max_body_size = max_body_size
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            check_encoding(headers)
            self._check_length(headers)
            async with asyncio.timeout(self._timeout):
                body = await self._read(receive)
        except TimeoutError:
            await BodyTimeoutError(self._timeout).response(scope)(scope, receive, send)
            return
        except APIError as error:
            if "expect" not in headers:
                await self._discard(receive)
            await error.response(scope)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > self._max_body_size):
            raise BodyTooLargeError(self._max_body_size)

    async def _read(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_size:
                raise BodyTooLargeError(self._max_body_size)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a rejected body, since closing with unread data would reset the connection too early."""
        size = 0
        try:
            async with asyncio.timeout(DISCARD_TIMEOUT):
                while size <= self._max_body_size:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def check_encoding(headers: Headers) -> None:
    """Raise UnsupportedMediaTypeError for a body with a Content-Encoding."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedMediaTypeError("The body of your request must not be compressed.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body first, and then the messages of the original, such as a disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
