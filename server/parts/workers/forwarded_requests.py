"""HTTP requests that a worker forwards to the coordinator, as ASGI messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.error_formats import ErrorFormats
from server.http.errors import EngineDeadError
from server.parts.workers import messages

logger = logging.getLogger(__name__)

DISCONNECT = {"type": "http.disconnect"}
# What the coordinator needs of a scope.
TEXT = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
TUPLES = ("headers", "client", "server")


class ForwardedRequests:
    """In the coordinator: runs its application for the requests of a worker. At most one part is on its way."""

    def __init__(self, app: ASGIApp, send: Callable[[Any], None]) -> None:
        self._app = app
        self._send = send
        self._running: dict[int, _Run] = {}

    def on_message(self, message: messages.OfWorkersRequests) -> None:
        """Begin with a request, or take a message about one, which may have ended."""
        if isinstance(message, messages.Forward):
            self._running[message.number] = _Run(message, self._app, self._send, self._running)
        elif run := self._running.get(message.number):
            run.on_message(message)

    def close(self) -> None:
        for run in self._running.values():
            run.task.cancel()


class _Run:
    """One forwarded request."""

    def __init__(
        self, request: messages.Forward, app: ASGIApp, send: Callable[[Any], None], running: dict[int, _Run]
    ) -> None:
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.sent = asyncio.Event()
        self.is_gone = False  # the client
        self._number = request.number
        self._app = app
        self._send = send
        self.task = asyncio.create_task(self._answer(_scope(request.scope)))
        self.task.add_done_callback(lambda task: running.pop(self._number, None))

    def on_message(self, message: messages.OfWorkersRequests) -> None:
        if isinstance(message, messages.RequestPart):
            self.parts.put_nowait(message.message)
            return
        self.sent.set()
        if isinstance(message, messages.Forget):  # the application notices that the client has disconnected
            self.is_gone = True
            self.parts.put_nowait(DISCONNECT)

    async def _answer(self, scope: Scope) -> None:
        try:
            await self._app(scope, self._receive, self._send_part)
        except Exception:
            logger.exception("a forwarded request failed")
            self._send(messages.ResponseEnd(self._number, has_failed=True))
        else:
            self._send(messages.ResponseEnd(self._number))

    async def _receive(self) -> Message:
        if self.is_gone:
            return DISCONNECT
        if self.parts.empty():
            self._send(messages.NextPart(self._number))
        part = await self.parts.get()
        self.is_gone = self.is_gone or part["type"] == DISCONNECT["type"]
        return part

    async def _send_part(self, part: Message) -> None:
        if self.is_gone:
            return
        self.sent.clear()
        self._send(messages.ResponsePart(self._number, dict(part)))
        await self.sent.wait()


class Forwarder:
    """In a worker: the application that forwards requests to the coordinator."""

    def __init__(self, send: Callable[[Any], None], next_number: Callable[[], int]) -> None:
        self._send = send
        self._next_number = next_number
        self._running: dict[int, asyncio.Queue[messages.OfForwarded]] = {}
        self._is_lost = False  # the coordinator

    def on_message(self, message: messages.OfForwarded) -> None:
        """Take a message about a request; nobody may wait for it any more."""
        if (queue := self._running.get(message.number)) is not None:
            queue.put_nowait(message)

    def fail(self) -> None:
        """End all requests with an error, and those that come, since the coordinator is lost."""
        self._is_lost = True
        for number, queue in self._running.items():
            queue.put_nowait(messages.ResponseEnd(number, has_failed=True))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as the coordinator does.

        Raises EngineDeadError if the coordinator is lost, RuntimeError if it fails after it has begun to answer.
        """
        if self._is_lost:
            raise EngineDeadError
        number = self._next_number()
        queue = self._running[number] = asyncio.Queue()
        reading: asyncio.Task[None] | None = None
        has_begun = False
        self._send(messages.Forward(number, {name: scope.get(name) for name in TEXT + TUPLES}))
        try:
            while True:
                match await queue.get():
                    case messages.NextPart() if reading is None or reading.done():
                        reading = asyncio.create_task(self._send_request_part(number, receive))
                    case messages.ResponsePart() as part:
                        has_begun = True
                        await send(part.message)
                        self._send(messages.PartSent(number))
                    case messages.ResponseEnd() as end:
                        if end.has_failed and has_begun:
                            raise RuntimeError("the coordinator could not answer a request")
                        if end.has_failed:
                            raise EngineDeadError
                        return
        finally:
            if reading is not None:
                reading.cancel()
            del self._running[number]
            self._send(messages.Forget(number))

    async def _send_request_part(self, number: int, receive: Receive) -> None:
        self._send(messages.RequestPart(number, dict(await receive())))


def forwarding(app: ASGIApp, *, paths: Collection[str], forwarder: ASGIApp, errors: ErrorFormats) -> ASGIApp:
    """Return an application that in a worker forwards all requests but the POSTs to some paths."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_own = scope["type"] != "http" or (scope["method"] == "POST" and scope["path"] in paths)
        try:
            await (app if is_own else forwarder)(scope, receive, send)
        except EngineDeadError as error:  # the coordinator is lost
            if is_own:
                raise
            await errors.response(error, scope)(scope, receive, send)

    return answer


def _scope(fields: dict[str, Any]) -> Scope:
    """Return the scope of a forwarded request, in which lists have been tuples before."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        **fields,
        "headers": [tuple(header) for header in fields["headers"]],
        "client": fields["client"] and tuple(fields["client"]),
        "server": fields["server"] and tuple(fields["server"]),
        "state": {},
    }
