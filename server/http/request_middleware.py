"""The layer around the application: who may ask, ids, limits, bodies, the access log, metrics, and status 500.

It is plain ASGI, since BaseHTTPMiddleware would hide a client's disconnect from streams. One object accompanies each
request, and one function sees each message of its response.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.access_control import Authentication, CrossOriginMiddleware, HostRules
from server.http.bodies import BodyReader, BodyShare
from server.http.error_formats import ErrorFormats
from server.http.errors import APIError, ServerError
from server.http.strict_json import EXCHANGE, StrictJSONRoute
from server.metrics import Metrics
from server.tenants import TENANT, Ledger, Tenant, client_address

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

# Requested every few seconds, so logged at level DEBUG.
POLLED_BY_THE_PAGE = ("engine", "queue", "blocks", "requests")
QUIET_PATHS = frozenset(
    {"/health", "/healthz", "/readyz", "/metrics", *(f"/lightwell/v1/{name}" for name in POLLED_BY_THE_PAGE)}
)
QUIET_STATUSES = (200, 503)  # 503: the model is being loaded
LOG_FIELDS = "log_fields"  # in the scope's state: a function that returns what else to log at the end of the request
PATH_CHARS = "/!$&'()*+,;=:@[]{}|^<>"  # which no log line needs quoted
CLIENT_CLOSED_REQUEST = 499  # in logs and metrics only
RETRY_COUNT = b"x-stainless-retry-count"  # a header of the official SDKs

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Application(FastAPI):
    """FastAPI behind the server's own layers, which answer most POST requests without it and its middleware."""

    layers: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.layers(scope, receive, send)


@dataclass(kw_only=True)
class RequestMiddleware:
    """Decides about each request before the application sees it, reads its body, and records its end."""

    app: ASGIApp
    routes: Mapping[str, StrictJSONRoute]  # of POST requests by their whole path; the application finds the others
    hosts: HostRules | None  # None: any host will do
    origins: Sequence[str]  # of web pages that may send requests
    authentication: Authentication
    ledger: Ledger
    bodies: BodyReader
    errors: ErrorFormats
    metrics: Metrics

    def __post_init__(self) -> None:
        self._cross_origin = CrossOriginMiddleware(_answer, self.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            route = self.routes.get(scope["path"]) if scope["method"] == "POST" else None
            exchange = Exchange(self, route, scope, receive, send)
            await exchange.run(self._cross_origin)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that the rules for web pages are around."""
    exchange: Exchange = scope["state"][EXCHANGE]
    await exchange.answer(send)


class Exchange:
    """One request and its response."""

    def __init__(
        self, rules: RequestMiddleware, route: StrictJSONRoute | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """`route`: what answers the request; None: the application does."""
        self._route = route
        self._rules = rules
        self._scope = scope
        self._receive = receive
        self._send = send
        self._start = time.monotonic()
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of each name
        self._request_id = choose_request_id(self._headers.get(b"x-request-id", b"").decode("latin-1"))
        self._status: int | None = None
        self._body: BodyShare | None = None
        self._unread: bytes | None = None  # the complete body, until the application has it
        self._tenant: Tenant | None = None
        self._number: int | None = None  # of the request in the ledger, while it counts as one of its tenant
        self._watch: asyncio.Task[None] | None = None  # for the client's disconnect
        self._is_client_gone = False
        scope["state"].update({"request_id": self._request_id, EXCHANGE: self})

    async def run(self, cross_origin: ASGIApp) -> None:
        """Answer the request; if a web page sent it, through `cross_origin`."""
        try:
            retries = self._headers.get(RETRY_COUNT, b"")
            if retries.isdigit() and retries.strip(b"0"):
                self._rules.metrics.count_retry()
            hosts = self._rules.hosts
            error = None if hosts is None else hosts.check(Headers(scope=self._scope))
            if error is not None:
                await self._refuse(error, self.send)
            elif b"origin" in self._headers:
                await cross_origin(self._scope, self._receive, self.send)
            else:
                await self.answer(self.send)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not self._is_client_gone:
                raise
        except Exception:
            logger.exception("a request failed", extra={"request_id": self._request_id})
            if self._watch is not None:
                self._watch.cancel()
            if self._status is None:
                await self._refuse(ServerError(self._request_id), self.send)
            # Otherwise the response has started. It stays incomplete, so uvicorn closes the connection.
        finally:
            await self._end()

    def end_with_client(self) -> None:
        """Cancel this task when the client disconnects. The body must have been read."""
        if self._watch is None and (task := asyncio.current_task()) is not None:
            self._watch = asyncio.create_task(self._cancel_on_disconnect(task))

    async def _cancel_on_disconnect(self, task: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_client_gone = True
        task.cancel()

    async def _end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None  # its exception refers to this object
        if self._is_client_gone and (task := asyncio.current_task()) is not None:
            task.uncancel()
        if self._body is not None:
            self._body.release()
        try:
            if self._number is not None:
                await self._leave()
        finally:
            self._record()
            del self._scope["state"][EXCHANGE]  # so that nothing of the request waits for the garbage collector

    async def answer(self, send: Send) -> None:
        """Let the application answer through `send`, if the request's tenant and its body are accepted.

        What counts as a request of a tenant is every POST but the cancelling of a request.
        """
        scope, rules, receive = self._scope, self._rules, self._receive
        try:
            self._tenant = rules.authentication.find_tenant(scope)
            scope["state"][TENANT] = self._tenant
            if scope["method"] == "POST":
                if not scope["path"].endswith("/cancel"):
                    self._number = await rules.ledger.enter(self._tenant)
                self._unread, self._body = await rules.bodies.read(scope, receive)
                receive = self.receive
            app = rules.app
            if (route := self._route) is not None:
                scope["route"] = route
                if route.ends_with_client:
                    self.end_with_client()
                app = await route.answer(Request(scope, receive))
            await app(scope, receive, send)
        except APIError as error:
            if self._status is not None:  # the response has started
                raise
            await self._refuse(error, send)

    async def receive(self) -> Message:
        """Return the body first, and then the messages that follow, such as a disconnect."""
        if (body := self._unread) is None:
            return await self._receive()
        self._unread = None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass on a message of the response.

        A body counts until its response begins: the application may use it until then. A client that has its answer may
        send the next request, so this one has ended for its tenant when the last part is sent.
        """
        if message["type"] == "http.response.start":
            self._status = message["status"]
            await self._add_headers(MutableHeaders(scope=message))
            if self._body is not None:
                self._body.release()
        elif self._number is not None and not message.get("more_body", False):
            await self._leave()
        await self._send(message)

    async def _add_headers(self, headers: MutableHeaders) -> None:
        if self._tenant is not None and self._tenant.account.rules:
            headers.update(await self._rules.ledger.headers(self._tenant))
        if b"origin" not in self._headers:  # else the rules for web pages have added it
            headers["vary"] = ", ".join([*headers.getlist("vary"), "Origin"])
        for name in self._rules.errors.find(self._scope).id_headers:
            headers[name] = self._request_id

    async def _leave(self) -> None:
        number, self._number = self._number, None
        if number is not None and self._tenant is not None:
            await self._rules.ledger.leave(self._tenant, number)

    async def _refuse(self, error: APIError, send: Send) -> None:
        response = self._rules.errors.response(error, self._scope)
        await response(self._scope, self._receive, send)

    def _record(self) -> None:
        scope, state = self._scope, self._scope["state"]
        status = self._status or CLIENT_CLOSED_REQUEST
        seconds = time.monotonic() - self._start
        self._rules.metrics.observe_http(getattr(scope.get("route"), "path", "none"), scope["method"], status, seconds)
        log_fields: Callable[[], dict[str, object]] = state.pop(LOG_FIELDS, dict)  # it holds what was generated
        fields = {
            "status": status,
            "ms": round(seconds * 1000, 1),
            **log_fields(),
            "client": client_address(scope) or "-",
            "request_id": self._request_id,
        }
        is_poll = scope["path"] in QUIET_PATHS and status in QUIET_STATUSES
        level = logging.DEBUG if is_poll else logging.INFO
        access_logger.log(
            level, "%s %s", scope["method"][:16], quote(scope["path"][:256], PATH_CHARS), extra={"fields": fields}
        )


class RootPathMiddleware:
    """Removes a prefix from paths, since a proxy may have left it there: all other code sees paths without it.

    The prefix alone is redirected to the one that ends with a slash, to which the page's own paths are relative.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._root_path:
            await RedirectResponse(f"{self._root_path}/")(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(f"{self._root_path}/"):
            scope["path"] = scope["path"].removeprefix(self._root_path)
        await self._app(scope, receive, send)


def choose_request_id(client_id: str | None) -> str:
    """Return the client's id if it is safe in headers and logs, else a new one."""
    if client_id is not None and _REQUEST_ID.fullmatch(client_id):
        return client_id
    return f"req_{secrets.token_hex(16)}"
