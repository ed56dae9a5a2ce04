"""Convert the exceptions of the framework and of pydantic to the errors that clients see."""

import difflib
import re
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from server.http.error_formats import ErrorFormats
from server.http.errors import (
    APIError,
    BadRequestError,
    InvalidTypeError,
    InvalidURLError,
    InvalidValueError,
    MethodNotAllowedError,
    MissingParameterError,
    ServerError,
    UnknownParameterError,
    clip,
)
from server.http.validation import describe_validation_errors
from server.part_table import missing_part

BASES = {"/v1": "/v1/models", "/api": "/api/tags"}  # a base URL: what shows that it is right
MIN_SIMILARITY = 0.8  # of a misspelled path
MAX_PATH = 100  # longer than all routes
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")


def from_http_exception(exc: HTTPException, request: Request, paths: Collection[str]) -> APIError:
    """Convert an exception of the framework, such as that for an unknown route. `paths` are those of the routes."""
    method, path = request.method, request.scope["path"]
    if exc.status_code == 404:
        if (problem := missing_part(path)) is not None:
            return APIError(404, problem, code="part_not_installed")
        return InvalidURLError(method, path, suggested_path(request, paths))
    if exc.status_code == 405:
        return MethodNotAllowedError(method, path, allowed_methods(request, path))
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
    return next(exact, None) or nearest_path(path[:MAX_PATH], paths)


def nearest_path(path: str, paths: Collection[str]) -> str | None:
    """Return the one of `paths` that is most like `path`, with or without /v1."""
    for spelling in (path, f"/v1{path}"):
        if nearest := difflib.get_close_matches(spelling, paths, n=1, cutoff=MIN_SIMILARITY):
            return nearest[0]
    return None


def from_validation_error(errors: list[dict[str, Any]], body: object) -> BadRequestError:
    """Convert pydantic's errors about a body to the one error that OpenAI would return."""
    problem = describe_validation_errors(errors, body)
    match problem.kind:
        case "missing":
            return MissingParameterError(problem.param)
        case "type":
            return InvalidTypeError(problem.param, problem.expected, problem.got)
        case "unknown":
            return UnknownParameterError(clip(problem.param))
        case _:
            return InvalidValueError(problem.message, param=problem.param or None, code=problem.code)


def install_error_handlers(app: FastAPI, errors: ErrorFormats, paths: Collection[str]) -> None:
    """Install handlers for all expected errors. `RequestMiddleware` handles the rest.

    `paths` are the paths that an error may suggest.
    """

    async def on_api_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, APIError)
        return errors.response(exc, request.scope)

    async def on_http_exception(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return errors.response(from_http_exception(exc, request, paths), request.scope)

    async def on_validation_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return errors.response(from_validation_error(list(exc.errors()), exc.body), request.scope)

    async def pass_on(request: Request, exc: Exception) -> Response:
        raise exc

    app.add_exception_handler(Exception, pass_on)
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
