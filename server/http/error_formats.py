"""How the APIs write errors: as the body of an answer, at the end of a stream, and for exceptions of the framework."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from server.http.errors import APIError, ErrorResponse, InvalidURLError, ServerError, clip
from server.http.responses import error_event
from server.http.validation import from_validation_error
from server.part_table import missing_part

BASES = {"/v1": "/v1/models", "/api": "/api/tags"}  # a base URL: what shows that it is right
MIN_SIMILARITY = 0.8  # of a misspelled path
MAX_PATH = 100  # longer than all routes
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFormat:
    """The format of one API's errors. The defaults are OpenAI's."""

    paths: re.Pattern[str] = re.compile("(?!)")  # with which the paths of its requests begin
    header: bytes | None = None  # that all clients of the API send, and no others
    schema: type[msgspec.Struct] = ErrorResponse  # of the body
    body: Callable[[APIError, str | None], bytes] = lambda error, request_id: error.body()
    last_events: Callable[[APIError, int], bytes] = lambda error, num_events: error_event(error)  # after so many
    id_headers: tuple[str, ...] = ("x-request-id",)  # that have the request's id


OPENAI_ERRORS = ErrorFormat()


class ErrorFormats:
    """Finds the format of a request's errors. A header decides before a path."""

    def __init__(self, formats: Iterable[ErrorFormat]) -> None:
        self._formats = sorted(dict.fromkeys(formats), key=lambda each: each.header is None)

    def find(self, scope: Scope) -> ErrorFormat:
        """Return the format that a request expects; OpenAI's, if it uses no other API."""
        headers = {name for name, _ in scope["headers"]}
        for format in self._formats:
            if format.header in headers or format.paths.match(scope["path"]):
                return format
        return OPENAI_ERRORS

    def response(self, error: APIError, scope: Scope) -> Response:
        """Return the answer to a request that failed. The error no longer holds the frames that hold it."""
        body = self.find(scope).body(error.with_traceback(None), scope.get("state", {}).get("request_id"))
        return Response(body, error.status, error.headers, media_type="application/json")


def from_http_exception(exc: HTTPException, request: Request, paths: Collection[str]) -> APIError:
    """Convert an exception of the framework, such as that for an unknown route. `paths` are those of the routes."""
    method, path = request.method, request.scope["path"]
    if exc.status_code == 404:
        if (problem := missing_part(path)) is not None:
            return APIError(404, problem, code="part_not_installed")
        return InvalidURLError(method, path, suggested_path(request, paths))
    if exc.status_code == 405:
        allowed = allowed_methods(request, path)
        message = f"Not allowed to {clip(method)} on {clip(path)}. (HINT: Use {' or '.join(allowed)}.)"
        return APIError(405, message, code="method_not_supported", headers={"allow": ", ".join(allowed)})
    if exc.status_code >= 500:
        return ServerError()
    return APIError(exc.status_code, f"{HTTPStatus(exc.status_code).phrase}.", headers=exc.headers)


def allowed_methods(request: Request, path: str) -> list[str]:
    """Return the methods that the application's routes have for a path."""

    def is_allowed(method: str) -> bool:
        scope = {**request.scope, "path": path, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return list(filter(is_allowed, METHODS))


def suggested_path(request: Request, paths: Collection[str]) -> str | None:
    """Return the path that a client means whose base URL is wrong, or whose path is misspelled."""
    path = re.sub("/+", "/", request.scope["path"]).rstrip("/")
    candidates = (path, f"/v1{path}", "/v1/" + path.rpartition("/v1/")[2], path.removeprefix("/v1"), BASES.get(path))
    exact = (candidate for candidate in candidates if candidate and allowed_methods(request, candidate))
    spellings = (path[:MAX_PATH], f"/v1{path[:MAX_PATH]}")
    alike = (difflib.get_close_matches(spelling, paths, n=1, cutoff=MIN_SIMILARITY) for spelling in spellings)
    return next(chain(exact, chain.from_iterable(alike)), None)


def install_error_handlers(app: FastAPI, errors: ErrorFormats, paths: Collection[str]) -> None:
    """Install handlers for the errors of the framework. `RequestMiddleware` handles the rest.

    `paths` are the paths that an error may suggest.
    """

    async def answer(request: Request, exc: Exception) -> Response:
        if isinstance(exc, HTTPException):
            return errors.response(from_http_exception(exc, request, paths), request.scope)
        if isinstance(exc, RequestValidationError):
            return errors.response(from_validation_error(list(exc.errors()), exc.body), request.scope)
        raise exc

    for kind in (Exception, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)
