"""The errors that a client can see; those of parts are made where they are raised.

The text of an exception other than `APIError` never reaches a client. Clients retry 408, 429 and 5xx, so errors of the
client have other statuses.
"""

from collections.abc import Mapping, Sequence

import msgspec
from starlette.responses import Response

INVALID_REQUEST = "invalid_request_error"
QUEUE_FULL = "The server is at capacity: its request queue is full. Please retry later."
MAX_LISTED = 8  # names of models in one message
MAX_RETRY_AFTER = 60  # seconds; some clients ignore longer times, and others then do not retry


# OpenAI's envelope. It always has all four fields, and its `code` is a string or null.
class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    error: ErrorDetail


class APIError(Exception):
    """An error response. Message, type, param and code are sent to the client, so they must not contain secrets."""

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
        """Return the body in OpenAI's envelope, always with its four keys."""
        detail = ErrorDetail(message=valid_utf8(self.message), type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorResponse(detail))

    def response(self) -> Response:
        """Return the response in OpenAI's envelope. `ErrorFormats` has that of the API which a request uses."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def valid_utf8(message: str) -> str:
    """Return a message that UTF-8 can encode."""
    return message.encode("utf-8", "replace").decode("utf-8")


class BadRequestError(APIError):
    """The client must change the request."""

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
    """A value of the wrong type. `expected` and `got` are phrases such as "an integer", "a string" or "null"."""

    def __init__(self, param: str, expected: str, got: str) -> None:
        message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
        super().__init__(message, param=param, code="invalid_type")


class InvalidValueError(BadRequestError):
    """An invalid value of the right type. `code` is OpenAI's name of the violated limit, if it has one."""

    def __init__(self, message: str, *, param: str | None, code: str | None = "invalid_value") -> None:
        super().__init__(message, param=param, code=code)


def invalid(param: str, problem: str, *, code: str | None = "invalid_value") -> InvalidValueError:
    """Return the error about the value of a field, with the problem as the end of a sentence."""
    return InvalidValueError(f"Invalid '{param}': {problem}.", param=param, code=code)


class UnknownParameterError(BadRequestError):
    """An unknown field, with --strict or in an object that allows no others. Elsewhere unknown fields are ignored."""

    def __init__(self, name: str) -> None:
        is_inner = "." in name  # OpenAI gives no `param` for top-level fields
        super().__init__(f"Unrecognized request argument supplied: {name}", param=name if is_inner else None)


class UnsupportedParameterError(BadRequestError):
    """A field of OpenAI's API that would change the answer, but is not supported."""

    def __init__(self, param: str, detail: str | None = None) -> None:
        message = f"Unsupported parameter: '{param}' is not supported yet."
        super().__init__(f"{message} {detail}" if detail else message, param=param, code="unsupported_parameter")


class ContextLengthExceededError(BadRequestError):
    """The prompt, or prompt and completion together, exceed the context length. All numbers are in tokens.

    `noun` is the endpoint's name for its input: "messages" or "prompt". `at_least` means that `num_prompt_tokens` is a
    lower bound.
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
        self.max_model_len, self.max_tokens = max_model_len, max_tokens
        self.num_prompt_tokens = f"at least {num_prompt_tokens}" if at_least else str(num_prompt_tokens)
        limit = f"This model's maximum context length is {max_model_len} tokens. However, "
        if max_tokens is None:
            text = f"your {noun} resulted in {self.num_prompt_tokens} tokens. Please reduce the length of the {noun}."
        else:
            text = (
                f"you requested {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the {noun}, "
                f"{max_tokens} in the completion). Please reduce the length of the {noun} or completion."
            )
        super().__init__(limit + text, param=noun, code="context_length_exceeded")


class UnauthorizedError(APIError):
    """No API key, or an invalid one. The message never contains the key."""

    def __init__(self, *, key_given: bool, scheme_missing: bool = False) -> None:
        message = (
            "Incorrect API key provided. Send one of the server's keys as 'Authorization: Bearer YOUR_KEY' or "
            "'x-api-key: YOUR_KEY'."
            if key_given
            else "You didn't provide an API key. You need to provide your API key in an Authorization header using "
            "Bearer auth (i.e. Authorization: Bearer YOUR_KEY), or as x-api-key."
        )
        if scheme_missing and not key_given:
            message += " (HINT: Your Authorization header does not begin with 'Bearer '.)"
        code = "invalid_api_key" if key_given else None
        super().__init__(401, message, code=code, headers={"www-authenticate": "Bearer"})


class ModelNotFoundError(APIError):
    """There is no such model. `available` are the names that the client may use instead."""

    def __init__(self, model: str, available: Sequence[str] = ()) -> None:
        message = f"The model `{clip(model)}` does not exist or you do not have access to it."
        if available:
            more = f" and {len(available) - MAX_LISTED} more" if len(available) > MAX_LISTED else ""
            names = ", ".join(f"`{clip(name)}`" for name in available[:MAX_LISTED])
            message += f" Available models: {names}{more}."
        super().__init__(404, message, code="model_not_found", param="model")


class InvalidURLError(APIError):
    """No route has this path. `suggestion` is a path that one has."""

    def __init__(self, method: str, path: str, suggestion: str | None = None) -> None:
        hint = f". (HINT: Did you mean {clip(suggestion)}?)" if suggestion else ""
        super().__init__(404, f"Invalid URL ({clip(method)} {clip(path)}){hint}")


class BodyTooLargeError(APIError):
    def __init__(self, max_body_size: int) -> None:
        message = f"The body of your request is larger than {max_body_size} bytes."
        super().__init__(413, message, code="request_too_large", headers={"connection": "close"})


class UnsupportedMediaTypeError(APIError):
    def __init__(self, message: str) -> None:
        super().__init__(415, message, code="unsupported_media_type")


class QueueFullError(APIError):
    """The maximum number of choices is in flight, the wait would be too long, or too much else of its kind waits.

    `retry_after` is in seconds.
    """

    def __init__(self, retry_after: float, message: str = QUEUE_FULL) -> None:
        super().__init__(
            429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=retry_headers(retry_after)
        )


class WaitTooLongError(QueueFullError):
    """The request is predicted to wait for longer than it may. All times are in seconds."""

    def __init__(self, wait: float, timeout: float, retry_after: float) -> None:
        waits = f"the request would wait for about {wait:.0f} seconds, and may for {timeout:g}"
        super().__init__(retry_after, f"The server is at capacity: {waits}. Please retry later.")


class ServerError(APIError):
    """A bug, or a request that the engine could not compute. Clients must not retry, since it would fail again."""

    def __init__(self, request_id: str | None = None) -> None:
        message = "The server had an error while processing your request."
        if request_id is not None:
            message += f" Please include the request ID {request_id} when you report it."
        super().__init__(500, message, type="server_error", headers={"x-should-retry": "false"})


class EngineUnavailableError(APIError):
    """The engine is starting, draining or dead. With `close`, the connection is closed after the response."""

    def __init__(
        self, message: str, *, code: str = "engine_unavailable", retry_after: float = 5, close: bool = False
    ) -> None:
        headers = retry_headers(retry_after)
        if close:
            headers["connection"] = "close"
        super().__init__(503, message, type="service_unavailable_error", code=code, headers=headers)


class QueueTimeoutError(EngineUnavailableError):
    """The engine did not begin with the request within `timeout` seconds."""

    def __init__(self, timeout: float, retry_after: float) -> None:
        message = f"The request waited for {timeout:g} seconds, its limit in the queue. Please retry later."
        super().__init__(message, code="request_timeout", retry_after=retry_after)


class RequestTimeoutError(EngineUnavailableError):
    """The request took too long in all. Clients must not retry it, since it would take as long again."""

    def __init__(self, timeout: float) -> None:
        message = f"The request took more than {timeout:g} seconds, the limit of this server (--request-timeout)."
        super().__init__(message, code="request_timeout")
        self.headers = {"x-should-retry": "false"}


class EngineDeadError(EngineUnavailableError):
    """The engine stopped before or during the request."""

    def __init__(self) -> None:
        super().__init__("The engine stopped while it was processing your request. Please retry later.", close=True)


class BuffersExceedMemoryError(EngineUnavailableError):
    """The bodies or the answers of all requests together exceed --max-buffered-bytes."""

    def __init__(self, noun: str = "bodies") -> None:
        message = f"The server has too many large {noun} in memory at the moment. Please retry later."
        super().__init__(message, code="server_is_overloaded", retry_after=2, close=True)


def retry_headers(seconds: float) -> dict[str, str]:
    """Return a Retry-After header of 1 to 60 whole seconds."""
    return {"retry-after": str(max(1, min(MAX_RETRY_AFTER, round(seconds))))}


def clip(text: str, limit: int = 128) -> str:
    """Shorten text from a client, to repeat it in a message."""
    return text if len(text) <= limit else text[:limit] + "..."
