"""Middleware that reads request bodies, with limits on size and time."""

import asyncio

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.body_budget import BodyBudget, BodyShare
from server.http.errors import (
    APIError,
    BodyTimeoutError,
    BodyTooLargeError,
    BuffersExceedMemoryError,
    UnsupportedMediaTypeError,
)

BODY_TIMEOUT = 60.0  # seconds from the end of a request's head to the end of its body
TEXT_SIZE = "text_size"  # in the scope's state: bytes of text that the request's work reads, as far as known
DISCARD_TIMEOUT = 1.0  # seconds to read the rest of a rejected body, so that the client can read the answer


class BodyMiddleware:
    """Reads the body of a POST request, and passes it to the application in one piece.

    A body over the size limit gets status 413 (by its Content-Length, or as soon as it exceeds the limit), a body that
    does not arrive in time 408; both close the connection. A compressed body gets 415 and is never decompressed.

    When all bodies in memory exceed `max_buffered_bytes`, those that have been arriving for the longest time get 503. A
    complete body counts until its response begins: the handler may use it until then.
    """

    def __init__(
        self, app: ASGIApp, max_body_size: int, max_buffered_bytes: int, timeout: float = BODY_TIMEOUT
    ) -> None:
        self._app = app
        self._max_body_size = min(max_body_size, max_buffered_bytes)
        self._budget = BodyBudget(max_buffered_bytes)
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            check_encoding(headers)
            self._check_length(headers)
            body, share = await self._receive_body(receive)
        except APIError as error:
            if "expect" not in headers and not isinstance(error, BodyTimeoutError):
                await self._discard(receive)
            await error.response(scope)(scope, receive, send)
            return
        scope["state"][TEXT_SIZE] = len(body)
        try:
            await self._app(scope, _replay(body, receive), _releasing(share, send))
        finally:
            share.release()

    async def _receive_body(self, receive: Receive) -> tuple[bytes, BodyShare]:
        """Return the body and its share of the budget.

        Raises BodyTimeoutError, BodyTooLargeError or BuffersExceedMemoryError.
        """
        deadline = asyncio.timeout(self._timeout)
        with self._budget.receive(deadline) as share:
            try:
                async with deadline:
                    return await self._read(receive, share), share
            except TimeoutError:
                if share.is_refused:
                    raise BuffersExceedMemoryError from None
                raise BodyTimeoutError(self._timeout) from None

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > self._max_body_size):
            raise BodyTooLargeError(self._max_body_size)

    async def _read(self, receive: Receive, share: BodyShare) -> bytes:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            share.add(message.get("body", b""))
            if share.num_bytes > self._max_body_size:
                raise BodyTooLargeError(self._max_body_size)
            if not message.get("more_body", False):
                return share.join()

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


def get_text_size(request: Request) -> int:
    """Return how many bytes of text the work for a request reads: those of its body, or what was noted since."""
    size: int = request.scope["state"].get(TEXT_SIZE, 0)
    return size


def note_text_size(request: Request, num_bytes: int) -> None:
    """Note that a request refers to stored text, so that its work reads at least `num_bytes`."""
    request.scope["state"][TEXT_SIZE] = max(get_text_size(request), num_bytes)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body first, and then the messages of the original, such as a disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _releasing(share: BodyShare, send: Send) -> Send:
    """Return a `send` that releases the share when the response begins."""

    async def send_and_release(message: Message) -> None:
        share.release()
        await send(message)

    return send_and_release
