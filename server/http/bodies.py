"""Reads request bodies, with limits on size, time and memory, and notes how much text a request has."""

import asyncio

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from server.http.errors import APIError, BodyTooLargeError, BuffersExceedMemoryError, UnsupportedMediaTypeError
from server.shares import MemoryBudget, MemoryShare

FREE_BYTES = 16 << 10  # smaller bodies are not counted, so that small requests pass while large ones fill the budget
BODY_TIMEOUT = 60.0  # seconds from the end of a request's head to the end of its body
TEXT_SIZE = "text_size"  # in the scope's state: bytes of text that the request's work reads, as far as known
DISCARD_TIMEOUT = 1.0  # seconds to read the rest of a rejected body, so that the client can read the answer


class BodyShare(MemoryShare):
    """One body, or what has arrived of it, and its share of the memory. Bodies that have counted longest give way."""

    def __init__(self, budget: MemoryBudget, deadline: asyncio.Timeout) -> None:
        super().__init__(budget, "", self._stop)
        self._deadline = deadline
        self.chunks: list[bytes] = []
        self.size = 0  # bytes

    def receive(self, chunk: bytes) -> None:
        """Keep and count bytes that were received. Raises BuffersExceedMemoryError if this body has been refused."""
        if self.error is None:
            self.chunks.append(chunk)
            self.size += len(chunk)
            if self.size > FREE_BYTES:
                self.add(self.size - self.num_bytes)
        if self.error is not None:
            raise BuffersExceedMemoryError

    def refusal(self) -> APIError:
        return BuffersExceedMemoryError()

    def _stop(self, error: APIError) -> None:
        """Make the task that receives the body stop."""
        self.chunks.clear()
        if not self._deadline.expired():
            self._deadline.reschedule(0)


class BodyReader:
    """Reads the bodies of requests.

    A body over the size limit gets status 413 (by its Content-Length, or as soon as it exceeds the limit), a body that
    does not arrive in time 408; both close the connection. A compressed body gets 415 and is never decompressed.

    When all bodies in memory exceed `max_buffered_bytes`, those that have been arriving for the longest time get 503. A
    complete body counts until its share is released.
    """

    def __init__(self, max_body_size: int, max_buffered_bytes: int, timeout: float = BODY_TIMEOUT) -> None:
        self._max_body_size = min(max_body_size, max_buffered_bytes)
        self._budget = MemoryBudget(max_buffered_bytes)
        self._timeout = timeout

    async def read(self, scope: Scope, receive: Receive) -> tuple[bytes, BodyShare]:
        """Return a complete body, and note its size as that of the request's text. The caller must release its share.

        Raises APIError once the client can read the answer, or ClientDisconnect.
        """
        headers = dict(reversed(scope["headers"]))  # the first of each name
        try:
            self._check_head(headers)
            share = await self._receive(receive)
        except APIError as error:
            if b"expect" not in headers and error.status != 408:
                await self._discard(receive)
            raise
        scope["state"][TEXT_SIZE] = share.size
        return share.chunks.pop(), share

    def _check_head(self, headers: dict[bytes, bytes]) -> None:
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise UnsupportedMediaTypeError("The body of your request must not be compressed.")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 15 or int(length) > self._max_body_size):
            raise BodyTooLargeError(self._max_body_size)

    async def _receive(self, receive: Receive) -> BodyShare:
        """Return the body. Raises APIError."""
        deadline = asyncio.timeout(self._timeout)
        share = BodyShare(self._budget, deadline)
        try:
            async with deadline:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    share.receive(message.get("body", b""))
                    if share.size > self._max_body_size:
                        raise BodyTooLargeError(self._max_body_size)
                    more = message.get("more_body", False)
            share.chunks[:] = [b"".join(share.chunks)]
        except BaseException as error:
            share.release()
            share.chunks.clear()  # the exception refers to this frame
            if not isinstance(error, TimeoutError):
                raise
            if share.error is not None:
                raise BuffersExceedMemoryError from None
            problem = f"The body of your request did not arrive within {self._timeout:g} seconds."
            headers = {"connection": "close"}
            raise APIError(408, problem, code="request_timeout", headers=headers) from None  # a retry may succeed
        self._budget.shares.pop(share, None)  # a complete body does not give way
        return share

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


def get_text_size(request: Request) -> int:
    """Return how many bytes of text the work for a request reads: those of its body, or what was noted since."""
    size: int = request.scope["state"].get(TEXT_SIZE, 0)
    return size
