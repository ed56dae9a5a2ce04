"""What every request passes before a handler sees it. Plain ASGI, since a stream must see its client go away.

From the outside in: `RequestMiddleware` (request id, access log, last resort for exceptions), `HostMiddleware` (no DNS
rebinding on loopback), CORS, `AuthMiddleware` (deny by default), `BodyMiddleware` (size and time of the body).
`StrictJSONRoute` then parses the body, once and strictly, if its type is JSON.
"""

import asyncio
import hashlib
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import (
    APIError,
    BadRequestError,
    BodyTimeoutError,
    BodyTooLargeError,
    ForbiddenError,
    ServerError,
    UnauthorizedError,
    UnsupportedMediaTypeError,
    is_for_anthropic,
)
from server.http.strict_json import parse_json_object
from server.metrics import Metrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

OPEN_PATHS = frozenset({"/health", "/healthz", "/readyz"})
QUIET_PATHS = OPEN_PATHS | {"/metrics"}  # asked for every few seconds
EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "x-lightwell-seed",
    "x-lightwell-deterministic",
    "x-lightwell-warnings",
    "retry-after",
)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

BODY_TIMEOUT = 60.0  # seconds from the request's head to the end of its body
DISCARD_TIMEOUT = 1.0  # seconds that the rest of a refused body is read, so that the client gets to read the answer
CLIENT_CLOSED_REQUEST = 499  # in logs and metrics only

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Gives each request an id, logs its end in one line, and answers what nobody else caught with 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        await _Exchange(scope, self._metrics).run(self._app, receive, send)


class _Exchange:
    """One request and what became of it."""

    def __init__(self, scope: Scope, metrics: Metrics) -> None:
        self._scope = scope
        self._metrics = metrics
        self._start = time.monotonic()
        self._headers = Headers(scope=scope)
        self._request_id = choose_request_id(self._headers.get("x-request-id"))
        self._status: int | None = None
        # Anthropic's clients look for the second name.
        self._id_headers = ("x-request-id", "request-id") if is_for_anthropic(scope) else ("x-request-id",)
        scope["state"]["request_id"] = self._request_id

    async def run(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        if is_retry(self._headers):
            self._metrics.count_retry()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                for name in self._id_headers:
                    MutableHeaders(scope=message)[name] = self._request_id
            await send(message)

        try:
            await app(self._scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("a request failed", extra={"request_id": self._request_id})
            if self._status is None:
                await ServerError(self._request_id).response(self._scope)(self._scope, receive, send_with_id)
            # Else the answer has begun; it stays without an end, so the server cuts the connection.
        finally:
            self._record()

    def _record(self) -> None:
        scope = self._scope
        status = self._status or CLIENT_CLOSED_REQUEST
        seconds = time.monotonic() - self._start
        self._metrics.observe_http(getattr(scope.get("route"), "path", "none"), scope["method"], status, seconds)
        fields = {
            "request_id": self._request_id,
            "client": (scope.get("client") or ("-",))[0],
            "status": status,
            "ms": round(seconds * 1000, 1),
        }
        level = logging.DEBUG if scope["path"] in QUIET_PATHS and status < 400 else logging.INFO
        access_logger.log(level, "%s %s", scope["method"][:16], scope["path"][:256], extra={"fields": fields})


def choose_request_id(given: str | None) -> str:
    """The client's own id if it is harmless in headers and logs, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"req_{secrets.token_hex(16)}"


def is_retry(headers: Headers) -> bool:
    """Whether one of the official SDKs says that it sends this request again."""
    count = headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdigit() and count.strip("0") != ""


class HostMiddleware:
    """Refuses requests that a browser was tricked into sending to a server on its own machine.

    For that trick (DNS rebinding) a domain must resolve to this machine, so a Host that is a domain must be one of
    `hosts`; addresses and names without a dot pass. The Origin, where there is one, must be a page of this machine or
    one of `origins`.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in hosts} | set(map(host_of_url, self._origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._origins and (error := self._check(Headers(scope=scope))):
            await error.response(scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> APIError | None:
        if any(self._is_foreign(host_of_url(f"//{host}")) for host in headers.getlist("host")):
            return ForbiddenError("The Host of your request is not one that this server answers to.")
        for origin in headers.getlist("origin"):
            if origin.lower() not in self._origins and host_of_url(origin) not in LOOPBACK_NAMES:
                return ForbiddenError("Pages of this Origin may not call this server; see --allowed-origins.")
        return None

    def _is_foreign(self, host: str) -> bool:
        return host == "" or (host not in self._hosts and "." in host and not is_address(host))


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def host_of_url(url: str) -> str:
    """The host in lower case, without port and brackets; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's, with refusals in our own words."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=[origin if origin == "*" else origin.rstrip("/") for origin in origins],
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return BadRequestError("Pages of this Origin may not send such a request.").response()


class AuthMiddleware:
    """Every path but OPEN_PATHS needs one of the keys, as `Authorization: Bearer` or as Anthropic's `x-api-key`.

    The path is the one that routing uses.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = [token for token in (bearer_token(scope["headers"]), api_key(scope["headers"])) if token]
            known = [self._is_known(token) for token in given]
            if not any(known):
                await UnauthorizedError(key_given=bool(given)).response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, token: bytes) -> bool:
        """Compares with every key in constant time, whichever matches."""
        digest = hashlib.sha256(token).digest()
        known = False
        for candidate in self._digests:
            known |= secrets.compare_digest(digest, candidate)
        return known


def bearer_token(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the one Authorization header with the scheme Bearer, in any case."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].strip().partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


def api_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The value of the one x-api-key header."""
    values = [value.strip() for name, value in headers if name == b"x-api-key"]
    return values[0] or None if len(values) == 1 else None


class BodyMiddleware:
    """Reads the body of a POST whole, within its limits, and hands it on in one piece.

    A body that is too large is 413 (by its Content-Length or while it comes), one that does not arrive in time 408;
    both close the connection. Compressed bodies are 415, not inflated.
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
        """Reads on for a moment: closing on unread data would reset the connection before the answer is read."""
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


def check_media_type(headers: Headers) -> None:
    """Raises UnsupportedMediaTypeError unless the body is JSON in UTF-8."""
    media_type, *parameters = headers.get("content-type", "").lower().split(";")
    if media_type.strip() != "application/json":
        raise UnsupportedMediaTypeError("The Content-Type of your request must be application/json.")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise UnsupportedMediaTypeError("The body of your request must be encoded in UTF-8.")


def check_encoding(headers: Headers) -> None:
    """Raises UnsupportedMediaTypeError for a body that is not sent as it is."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedMediaTypeError("The body of your request must not be compressed.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and then what really comes: the client going away."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


class StrictJSONRequest(Request):
    """A request whose body has one reading, by `parse_json_object`."""

    async def json(self) -> dict[str, Any]:
        if self._parsed is None:
            self._parsed = parse_json_object(await self.body())
        return self._parsed

    _parsed: dict[str, Any] | None = None


class StrictJSONRoute(APIRoute):
    """A route whose handler may declare a pydantic model as its body; it sees what `parse_json_object` made of it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict_handler(request: Request) -> Response:
            request = StrictJSONRequest(request.scope, request.receive)
            if request.method == "POST":
                check_media_type(request.headers)
                await request.json()
            return await handler(request)

        return strict_handler
