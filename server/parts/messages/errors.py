"""Errors in Anthropic's envelope."""

import re
from typing import Literal

import msgspec

from server.http.error_formats import ErrorFormat
from server.http.errors import INVALID_REQUEST, APIError, valid_utf8

VERSION_HEADER = b"anthropic-version"  # that all of Anthropic's clients send
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Anthropic's envelope. Error events of a stream have no id, which is in the headers of the response."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None = None


def error_body(error: APIError, request_id: str | None = None) -> bytes:
    detail = AnthropicErrorDetail(TYPES.get(error.status, INVALID_REQUEST), valid_utf8(error.anthropic_message))
    return msgspec.json.encode(AnthropicErrorResponse(type="error", error=detail, request_id=request_id))


def error_event(error: APIError, num_events: int = 0) -> bytes:
    """Return the last event of a stream that failed."""
    return b"event: error\ndata: " + error_body(error) + b"\n\n"


ANTHROPIC_ERRORS = ErrorFormat(
    paths=re.compile(r"/v1/messages(/|\Z)"),
    header=VERSION_HEADER,
    schema=AnthropicErrorResponse,
    body=error_body,
    last_events=error_event,
    id_headers=("x-request-id", "request-id"),  # the second is what Anthropic's clients read
)
