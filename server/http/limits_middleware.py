"""Middleware that holds each tenant to the limits of its entry in the keys file."""

from contextlib import AsyncExitStack

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.ledger import Ledger
from server.http.errors import APIError, ConcurrencyLimitError, QuotaExceededError, RateLimitError
from server.limits.accounts import LimitReachedError
from server.tenants import TENANT, Tenant


class LimitsMiddleware:
    """Counts the requests of each tenant, refuses those beyond its limits, and adds headers about them to all answers.

    What counts is every POST but the cancelling of a request.
    """

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        self._app = app
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tenant: Tenant = scope["state"][TENANT]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(await self._ledger.headers(tenant))
            await send(message)

        if not _is_counted(scope):
            await self._app(scope, receive, send_with_headers)
            return
        async with AsyncExitStack() as stack:

            async def send_and_leave(message: Message) -> None:
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    await stack.aclose()  # a client that has its answer may send the next request
                await send_with_headers(message)

            try:
                await stack.enter_async_context(self._ledger.request(tenant))
            except (LimitReachedError, APIError) as error:
                await _api_error(error).response(scope)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_and_leave)


def _api_error(error: LimitReachedError | APIError) -> APIError:
    if isinstance(error, APIError):
        return error
    match error.name:
        case "max_concurrent_requests":
            return ConcurrencyLimitError(error.limit)
        case "tokens_per_day":
            return QuotaExceededError(error.limit)
        case _:
            return RateLimitError(error.name.partition("_")[0], error.limit, error.retry_after)


def _is_counted(scope: Scope) -> bool:
    return scope["method"] == "POST" and not scope["path"].endswith("/cancel")
