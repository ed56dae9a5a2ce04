"""Every error that a client can see, in OpenAI's envelope, or in Anthropic's where its API was called.

    APIError
    ├── BadRequestError              400
    │   ├── InvalidJSONError
    │   ├── MissingParameterError
    │   ├── InvalidTypeError
    │   ├── InvalidValueError
    │   ├── UnknownParameterError
    │   ├── UnsupportedParameterError
    │   ├── ContextLengthExceededError
    │   └── PreviousResponseNotFoundError
    ├── UnauthorizedError            401
    ├── ForbiddenError               403
    ├── ModelNotFoundError           404
    ├── RequestNotFoundError         404
    ├── RecordingNotFoundError       404
    ├── RecordedAdapterError         404
    ├── AdapterNotFoundError         404
    ├── UpdatesNotAllowedError       404
    ├── ResponseNotFoundError        404
    │   └── ResponseGoneError
    ├── InvalidURLError              404
    ├── MethodNotAllowedError        405
    ├── BodyTimeoutError             408
    ├── BodyTooLargeError            413
    ├── UnsupportedMediaTypeError    415
    ├── QueueFullError               429
    ├── ServerError                  500
    └── EngineUnavailableError       503
        ├── EngineDeadError
        └── AdaptersBusyError

The text of an exception that is not in this tree never reaches a client. Clients retry 408, 429 and 5xx, so what a
client did wrong is never one of these.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from server.http.error_schemas import AnthropicErrorDetail, AnthropicErrorResponse, ErrorDetail, ErrorResponse
from server.http.validation import describe_validation_errors

INVALID_REQUEST = "invalid_request_error"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
MAX_RETRY_AFTER = 60  # seconds; above this some clients stop to listen, and others stop to retry


class APIError(Exception):
    """An answer that is not 2xx. Message, type, param and code are the body, so all of them must be fit for clients."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON body, always with the four keys that OpenAI's clients read."""
        detail = ErrorDetail(message=_valid(self.message), type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorResponse(detail))

    def anthropic_body(self, request_id: str | None = None) -> bytes:
        """The same in Anthropic's envelope."""
        detail = AnthropicErrorDetail(ANTHROPIC_TYPES.get(self.status, INVALID_REQUEST), _valid(self.anthropic_message))
        return msgspec.json.encode(AnthropicErrorResponse(type="error", error=detail, request_id=request_id))

    def response(self, scope: Scope | None = None) -> Response:
        """In the envelope of the API that the request of this scope is for; None: OpenAI's."""
        if scope is not None and is_for_anthropic(scope):
            body = self.anthropic_body(scope.get("state", {}).get("request_id"))
        else:
            body = self.body()
        return Response(body, self.status, self.headers, media_type="application/json")

    @property
    def anthropic_message(self) -> str:
        """Anthropic's envelope has no `param`, so the message names the field."""
        return self.message if self.param is None or self.param in self.message else f"{self.param}: {self.message}"


def _valid(message: str) -> str:
    return message.encode("utf-8", "replace").decode("utf-8")


def is_for_anthropic(scope: Scope) -> bool:
    """Whether a request speaks Anthropic's API: by its path, or by the header that all of its clients send."""
    if f"{scope['path']}/".startswith("/v1/messages/"):
        return True
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


class BadRequestError(APIError):
    """Something in the request that the client has to change."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param=param, code=code)


class InvalidJSONError(BadRequestError):
    def __init__(self, hint: str) -> None:
        super().__init__(f"We could not parse the JSON body of your request. (HINT: {hint})")


class MissingParameterError(BadRequestError):
    def __init__(self, param: str) -> None:
        if param == "model":
            super().__init__("you must provide a model parameter")
        else:
            super().__init__(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


class InvalidTypeError(BadRequestError):
    """`expected` and `got` are phrases with their article: "an integer", "a string", "null"."""

    def __init__(self, param: str, expected: str, got: str) -> None:
        message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
        super().__init__(message, param=param, code="invalid_type")


class InvalidValueError(BadRequestError):
    """A value of the right type that cannot be meant. `code` is OpenAI's name of the limit that it breaks, if any."""

    def __init__(self, message: str, *, param: str | None, code: str | None = "invalid_value") -> None:
        super().__init__(message, param=param, code=code)


class UnknownParameterError(BadRequestError):
    """Raised with --strict, and in objects that allow no others; elsewhere unknown fields are ignored and counted."""

    def __init__(self, name: str) -> None:
        is_inner = "." in name  # of one of the body's own fields OpenAI says no `param`
        super().__init__(f"Unrecognized request argument supplied: {name}", param=name if is_inner else None)


class UnsupportedParameterError(BadRequestError):
    """A field that OpenAI has and this server has not, and that would change the answer."""

    def __init__(self, param: str, detail: str | None = None) -> None:
        message = f"Unsupported parameter: '{param}' is not supported yet."
        super().__init__(f"{message} {detail}" if detail else message, param=param, code="unsupported_parameter")


class ContextLengthExceededError(BadRequestError):
    """The prompt, or prompt and completion together, do not fit. All numbers are tokens.

    `noun` is what the endpoint calls its input: "messages" or "prompt". With `at_least` the prompt's tokens are not
    counted: they may be more. Clients of Anthropic's look for its words, to know by how much to shorten.
    """

    def __init__(
        self,
        max_model_len: int,
        num_prompt_tokens: int,
        max_tokens: int | None = None,
        *,
        noun: str = "messages",
        at_least: bool = False,
    ) -> None:
        limit = f"This model's maximum context length is {max_model_len} tokens. However, "
        if max_tokens is None:
            number = f"at least {num_prompt_tokens}" if at_least else str(num_prompt_tokens)
            text = f"your {noun} resulted in {number} tokens. Please reduce the length of the {noun}."
            self._anthropic_message = f"prompt is too long: {number} tokens > {max_model_len} maximum"
        else:
            self._anthropic_message = (
                f"input length and `max_tokens` exceed context limit: {num_prompt_tokens} + {max_tokens} > "
                f"{max_model_len}, decrease input length or `max_tokens` and try again"
            )
            text = (
                f"you requested {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the {noun}, "
                f"{max_tokens} in the completion). Please reduce the length of the {noun} or completion."
            )
        super().__init__(limit + text, param=noun, code="context_length_exceeded")

    @property
    def anthropic_message(self) -> str:
        return self._anthropic_message


class PreviousResponseNotFoundError(BadRequestError):
    """A 400, as OpenAI answers."""

    def __init__(self, response_id: str) -> None:
        message = f"Previous response with id '{clip(response_id)}' not found."
        super().__init__(message, param="previous_response_id", code="previous_response_not_found")


class UnauthorizedError(APIError):
    """No key, or one that is not ours. The key itself is never repeated."""

    def __init__(self, *, key_given: bool) -> None:
        message = (
            "Incorrect API key provided."
            if key_given
            else "You didn't provide an API key. You need to provide your API key in an Authorization header using "
            "Bearer auth (i.e. Authorization: Bearer YOUR_KEY), or as x-api-key."
        )
        code = "invalid_api_key" if key_given else None
        super().__init__(401, message, code=code, headers={"www-authenticate": "Bearer"})


class ForbiddenError(APIError):
    def __init__(self, message: str) -> None:
        super().__init__(403, message)


class ModelNotFoundError(APIError):
    def __init__(self, model: str) -> None:
        message = f"The model `{clip(model)}` does not exist or you do not have access to it."
        super().__init__(404, message, code="model_not_found", param="model")


class RequestNotFoundError(APIError):
    def __init__(self, request_id: str) -> None:
        super().__init__(404, f"No request with the id '{clip(request_id)}' is running.", code="request_not_found")


class RecordingNotFoundError(APIError):
    def __init__(self, request_id: str, *, num_kept: int) -> None:
        message = "No requests are recorded: start the server with --record-requests."
        if num_kept:
            message = f"No ended request with the id '{clip(request_id)}' is among the last {num_kept} recorded ones."
        super().__init__(404, message, code="request_not_found")


class RecordedAdapterError(APIError):
    """A recorded request cannot be run again: its LoRA adapter has been unloaded, or replaced by another one."""

    def __init__(self, name: str) -> None:
        message = f"The LoRA adapter '{clip(name)}' that answered the recorded request is no longer loaded."
        super().__init__(404, message, code="model_not_found")


class AdapterNotFoundError(APIError):
    def __init__(self, name: str) -> None:
        message = f"The lora adapter '{clip(name)}' cannot be found."
        super().__init__(404, message, code="model_not_found", param="lora_name")


class UpdatesNotAllowedError(APIError):
    def __init__(self) -> None:
        message = "LoRA adapters stay as they are: start the server with --allow-runtime-lora-updating to change them."
        super().__init__(404, message, code="not_enabled")


class ResponseNotFoundError(APIError):
    def __init__(self, response_id: str) -> None:
        super().__init__(404, f"Response with id '{clip(response_id)}' not found.")


class ResponseGoneError(ResponseNotFoundError):
    """It was there when it began to be read."""

    def __init__(self, response_id: str) -> None:
        super().__init__(response_id)
        self.message = (
            f"Response with id '{response_id}' is no longer kept: it was deleted, or dropped to make room for others "
            "(--max-stored-responses, --stored-responses-memory)."
        )


class InvalidURLError(APIError):
    def __init__(self, method: str, path: str) -> None:
        super().__init__(404, f"Invalid URL ({clip(method)} {clip(path)})")


class MethodNotAllowedError(APIError):
    def __init__(self, method: str, path: str, allow: str) -> None:
        message = (
            f"Not allowed to {clip(method)} on {clip(path)}. (HINT: Perhaps you meant to use a different HTTP method?)"
        )
        super().__init__(405, message, code="method_not_supported", headers={"allow": allow} if allow else None)


class BodyTimeoutError(APIError):
    """The body did not arrive in time. 408, since the client may well try again on a better line."""

    def __init__(self, timeout: float) -> None:
        message = f"The body of your request did not arrive within {timeout:g} seconds."
        super().__init__(408, message, code="request_timeout", headers={"connection": "close"})


class BodyTooLargeError(APIError):
    def __init__(self, max_body_size: int) -> None:
        message = f"The body of your request is larger than {max_body_size} bytes."
        super().__init__(413, message, code="request_too_large", headers={"connection": "close"})


class UnsupportedMediaTypeError(APIError):
    def __init__(self, message: str) -> None:
        super().__init__(415, message, code="unsupported_media_type")


class QueueFullError(APIError):
    """As many choices are in flight as the server holds. `retry_after` is in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            429,
            "The server is at capacity: its queue of requests is full. Please retry later.",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers=retry_headers(retry_after),
        )


class ServerError(APIError):
    """A bug, or a request that the engine could not compute. The same request would fail again, so: no retry."""

    def __init__(self, request_id: str | None = None) -> None:
        message = "The server had an error while processing your request."
        if request_id is not None:
            message += f" Please include the request ID {request_id} when you report it."
        super().__init__(500, message, type="server_error", headers={"x-should-retry": "false"})


class EngineUnavailableError(APIError):
    """Not ready yet, draining, or dead. With `close`, the connection ends with the answer."""

    def __init__(
        self, message: str, *, code: str = "engine_unavailable", retry_after: float = 5, close: bool = False
    ) -> None:
        headers = retry_headers(retry_after)
        if close:
            headers["connection"] = "close"
        super().__init__(503, message, type="service_unavailable_error", code=code, headers=headers)


class EngineDeadError(EngineUnavailableError):
    """The engine stopped while the request was running, or before."""

    def __init__(self) -> None:
        super().__init__("The engine stopped while it was processing your request. Please retry later.", close=True)


class AdaptersBusyError(EngineUnavailableError):
    """The engine cannot take a LoRA adapter now, but may later. The message is its own."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="adapters_busy")


def retry_headers(seconds: float) -> dict[str, str]:
    """A Retry-After of whole seconds between 1 and 60."""
    return {"retry-after": str(max(1, min(MAX_RETRY_AFTER, round(seconds))))}


def clip(text: str, limit: int = 128) -> str:
    """What a client sent, short enough to be repeated to it."""
    return text if len(text) <= limit else text[:limit] + "..."


def error_event(error: APIError) -> bytes:
    """The end of a stream that failed after its start: the error, then [DONE]."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


def from_http_exception(exc: HTTPException, method: str, path: str) -> APIError:
    """What the framework raises for routes that do not exist, in our words."""
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
    """Turns pydantic's errors about a body into the one that OpenAI would answer with."""
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
    """Answers every error raised in a handler. What is unknown is left to the middleware."""

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
