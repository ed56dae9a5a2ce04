"""Convert the exceptions of the framework and of pydantic to the errors that clients see."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

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


def from_http_exception(exc: HTTPException, method: str, path: str) -> APIError:
    """Convert an exception of the framework, such as that for an unknown route."""
    if exc.status_code == 404:
        return InvalidURLError(method, path)
    if exc.status_code == 405:
        return MethodNotAllowedError(
            method, path, (exc.headers or {}).get("allow", (exc.headers or {}).get("Allow", ""))
        )
    if exc.status_code >= 500:
        return ServerError()
    return APIError(exc.status_code, f"{HTTPStatus(exc.status_code).phrase}.", headers=exc.headers)


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
        return from_http_exception(exc, request.method, request.scope["path"]).response(request.scope)

    async def on_validation_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return from_validation_error(list(exc.errors()), exc.body).response(request.scope)

    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
