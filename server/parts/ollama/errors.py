"""Errors in Ollama's envelope."""

import re

import msgspec

from server.http.error_formats import ErrorFormat
from server.http.errors import APIError, valid_utf8


class OllamaErrorResponse(msgspec.Struct, frozen=True):
    """Ollama's envelope, also of the last line of a stream that failed."""

    error: str


def error_body(error: APIError, request_id: str | None = None) -> bytes:
    return msgspec.json.encode(OllamaErrorResponse(valid_utf8(error.named_message)))


def error_line(error: APIError, num_events: int = 0) -> bytes:
    """Return the last line of a stream that failed."""
    return error_body(error) + b"\n"


OLLAMA_ERRORS = ErrorFormat(
    paths=re.compile("/api/"), schema=OllamaErrorResponse, body=error_body, last_events=error_line
)
