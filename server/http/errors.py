"""All errors that a client can see.

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
    │   └── WaitTooLongError
    ├── RateLimitError               429
    ├── ConcurrencyLimitError        429
    ├── QuotaExceededError           429
    ├── ServerError                  500
    ├── NotImplementedAPIError       501
    └── EngineUnavailableError       503
        ├── QueueTimeoutError
        ├── RequestTimeoutError
        ├── EngineDeadError
        ├── AdapterLostError
        ├── AdaptersBusyError
        └── BuffersExceedMemoryError

The text of an exception outside of this tree never reaches a client. Clients retry 408, 429 and 5xx, so errors of the
client have other statuses.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec
from starlette.responses import Response

from server.http.error_schemas import ErrorDetail, ErrorResponse

INVALID_REQUEST = "invalid_request_error"
QUEUE_FULL = "The server is at capacity: its request queue is full. Please retry later."
MAX_LISTED = 8  # names of models in one message
MAX_RETRY_AFTER = 60  # seconds; some clients ignore longer times, and others then do not retry


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

    @property
    def named_message(self) -> str:
        """The message with the name of the field, for envelopes that have no `param`."""
        return self.message if self.param is None or self.param in self.message else f"{self.param}: {self.message}"

    @property
    def anthropic_message(self) -> str:
        """The message in Anthropic's envelope."""
        return self.named_message


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
    lower bound. Anthropic's clients parse its wording of the message, to know by how much to shorten the input.
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
    """The previous response does not exist. The status is 400, as in OpenAI's API."""

    def __init__(self, response_id: str) -> None:
        message = f"Previous response with id '{clip(response_id)}' not found."
        super().__init__(message, param="previous_response_id", code="previous_response_not_found")


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


class ForbiddenError(APIError):
    def __init__(self, message: str) -> None:
        super().__init__(403, message)


class ModelNotFoundError(APIError):
    """There is no such model. `available` are the names that the client may use instead."""

    def __init__(self, model: str, available: Sequence[str] = ()) -> None:
        message = f"The model `{clip(model)}` does not exist or you do not have access to it."
        if available:
            more = f" and {len(available) - MAX_LISTED} more" if len(available) > MAX_LISTED else ""
            names = ", ".join(f"`{clip(name)}`" for name in available[:MAX_LISTED])
            message += f" Available models: {names}{more}."
        super().__init__(404, message, code="model_not_found", param="model")


class RequestNotFoundError(APIError):
    def __init__(self, request_id: str) -> None:
        super().__init__(404, f"No request with the id '{clip(request_id)}' is running.", code="request_not_found")


class RecordingNotFoundError(APIError):
    def __init__(self, request_id: str, *, num_kept: int) -> None:
        message = "Requests are not recorded: start the server with --record-requests."
        if num_kept:
            message = f"No request with the id '{clip(request_id)}' is among the last {num_kept} finished requests."
        super().__init__(404, message, code="request_not_found")


class RecordedAdapterError(APIError):
    """A recorded request cannot be replayed, since its LoRA adapter was unloaded or replaced."""

    def __init__(self, name: str) -> None:
        message = f"The LoRA adapter '{clip(name)}' of the recorded request is not loaded any more."
        super().__init__(404, message, code="model_not_found")


class AdapterNotFoundError(APIError):
    def __init__(self, name: str) -> None:
        message = f"The lora adapter '{clip(name)}' cannot be found."
        super().__init__(404, message, code="model_not_found", param="lora_name")


class UpdatesNotAllowedError(APIError):
    def __init__(self) -> None:
        message = "LoRA adapters cannot be changed: start the server with --allow-runtime-lora-updating."
        super().__init__(404, message, code="not_enabled")


class ResponseNotFoundError(APIError):
    def __init__(self, response_id: str) -> None:
        super().__init__(404, f"Response with id '{clip(response_id)}' not found.")


class ResponseGoneError(ResponseNotFoundError):
    """The response was deleted or dropped while it was being read."""

    def __init__(self, response_id: str) -> None:
        super().__init__(response_id)
        self.message = (
            f"Response with id '{response_id}' is no longer stored: it was deleted, or dropped to make room for others "
            "(--max-stored-responses, --stored-responses-memory)."
        )


class InvalidURLError(APIError):
    """No route has this path. `suggestion` is a path that one has."""

    def __init__(self, method: str, path: str, suggestion: str | None = None) -> None:
        hint = f". (HINT: Did you mean {clip(suggestion)}?)" if suggestion else ""
        super().__init__(404, f"Invalid URL ({clip(method)} {clip(path)}){hint}")


class MethodNotAllowedError(APIError):
    """The path has routes, but only for the methods in `allowed`."""

    def __init__(self, method: str, path: str, allowed: Sequence[str]) -> None:
        message = f"Not allowed to {clip(method)} on {clip(path)}. (HINT: Use {' or '.join(allowed)}.)"
        super().__init__(405, message, code="method_not_supported", headers={"allow": ", ".join(allowed)})


class BodyTimeoutError(APIError):
    """The body did not arrive in time. The status is 408, since a retry may succeed."""

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


class RateLimitError(APIError):
    """The requests or tokens per minute of the client's key are used up. `retry_after` is in seconds."""

    def __init__(self, noun: str, per_minute: int, retry_after: float) -> None:
        super().__init__(
            429,
            f"Rate limit reached: {per_minute} {noun} per minute. Please try again in {max(retry_after, 0.001):.3f}s.",
            type=noun,
            code="rate_limit_exceeded",
            headers=retry_headers(math.ceil(retry_after)),
        )


class ConcurrencyLimitError(APIError):
    """The client's key has as many requests running as it may have."""

    def __init__(self, max_requests: int) -> None:
        message = f"Rate limit reached: {max_requests} requests at a time. Please try again when one has ended."
        super().__init__(429, message, type="requests", code="rate_limit_exceeded", headers=retry_headers(1))


class QuotaExceededError(APIError):
    """The tokens per day of the client's key are used up. Clients must not retry it soon."""

    def __init__(self, tokens_per_day: int) -> None:
        message = f"You exceeded your current quota: {tokens_per_day} tokens per day, which are renewed at 00:00 UTC."
        name = "insufficient_quota"
        super().__init__(429, message, type=name, code=name, headers={"x-should-retry": "false"})


class ServerError(APIError):
    """A bug, or a request that the engine could not compute. Clients must not retry, since it would fail again."""

    def __init__(self, request_id: str | None = None) -> None:
        message = "The server had an error while processing your request."
        if request_id is not None:
            message += f" Please include the request ID {request_id} when you report it."
        super().__init__(500, message, type="server_error", headers={"x-should-retry": "false"})


class NotImplementedAPIError(APIError):
    """An operation of a supported API that this server does not have. Clients must not retry it."""

    def __init__(self, detail: str) -> None:
        super().__init__(501, detail, code="not_implemented", headers={"x-should-retry": "false"})


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


class AdapterLostError(EngineUnavailableError):
    """A request waited for a restarted engine, which could not load the request's LoRA adapter again."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The LoRA adapter '{clip(name)}' could not be loaded again after a restart of the engine.")


class AdaptersBusyError(EngineUnavailableError):
    """The engine cannot load a LoRA adapter at the moment. The message comes from the engine."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="adapters_busy")


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
