"""Convert the exceptions of the framework and of pydantic to the errors that clients see."""

import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

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

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")


def from_http_exception(exc: HTTPException, request: Request) -> APIError:
    """Convert an exception of the framework, such as that for an unknown route."""
    method, path = request.method, request.scope["path"]
    if exc.status_code == 404:
        return InvalidURLError(method, path, suggested_path(request))
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


def suggested_path(request: Request) -> str | None:
    """Return the path that a client with a wrong base URL means: one without /v1, or with something before it."""
    path = re.sub("/+", "/", request.scope["path"]).rstrip("/")
    candidates = (path, f"/v1{path}", "/v1/" + path.rpartition("/v1/")[2])
    return next((candidate for candidate in candidates if allowed_methods(request, candidate)), None)


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


def install_error_handlers(app: FastAPI) -> None:
    """Install handlers for all expected errors. `RequestMiddleware` handles the rest."""

    async def on_api_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, APIError)
        return exc.response(request.scope)

    async def on_http_exception(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return from_http_exception(exc, request).response(request.scope)

    async def on_validation_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return from_validation_error(list(exc.errors()), exc.body).response(request.scope)

    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
