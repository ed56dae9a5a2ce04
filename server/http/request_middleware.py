"""The outermost middleware: request ids, the access log, HTTP metrics, and status 500 for unhandled exceptions.

All middleware is plain ASGI, since BaseHTTPMiddleware would hide a client's disconnect from streams. From the outside
in: `RequestMiddleware`, `HostMiddleware` (against DNS rebinding), CORS, `AuthMiddleware`, `LimitsMiddleware`,
`BodyMiddleware`.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import ServerError, is_for_anthropic
from server.metrics import Metrics
from server.tenants import client_address

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

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Gives each request an id, logs one line when it ends, and returns status 500 for unhandled exceptions."""

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
        await _RequestRecord(scope, self._metrics).run(self._app, receive, send)


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


class _RequestRecord:
    """One request: runs it, and records its status and duration."""

    def __init__(self, scope: Scope, metrics: Metrics) -> None:
        self._scope = scope
        self._metrics = metrics
        self._start = time.monotonic()
        self._headers = Headers(scope=scope)
        self._request_id = choose_request_id(self._headers.get("x-request-id"))
        self._status: int | None = None
        # Anthropic's clients read the second name.
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
            # Otherwise the response has started. It stays incomplete, so uvicorn closes the connection.
        finally:
            self._record()

    def _record(self) -> None:
        scope = self._scope
        status = self._status or CLIENT_CLOSED_REQUEST
        seconds = time.monotonic() - self._start
        self._metrics.observe_http(getattr(scope.get("route"), "path", "none"), scope["method"], status, seconds)
        token_fields: Callable[[], dict[str, object]] = scope["state"].get(LOG_FIELDS, dict)
        fields = {
            "status": status,
            "ms": round(seconds * 1000, 1),
            **token_fields(),
            "client": client_address(scope) or "-",
            "request_id": self._request_id,
        }
        is_poll = scope["path"] in QUIET_PATHS and status in QUIET_STATUSES
        level = logging.DEBUG if is_poll else logging.INFO
        access_logger.log(
            level, "%s %s", scope["method"][:16], quote(scope["path"][:256], PATH_CHARS), extra={"fields": fields}
        )


def choose_request_id(client_id: str | None) -> str:
    """Return the client's id if it is safe in headers and logs, else a new one."""
    if client_id is not None and _REQUEST_ID.fullmatch(client_id):
        return client_id
    return f"req_{secrets.token_hex(16)}"


def is_retry(headers: Headers) -> bool:
    """Return whether the headers of the official SDKs mark this request as a retry."""
    count = headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdigit() and count.strip("0") != ""
