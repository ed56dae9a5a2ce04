"""The error envelopes of the APIs. OpenAI's always has all four fields, and its `code` is a string or null."""

from typing import Literal

import msgspec


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Anthropic's envelope. Error events of a stream have no id, which is in the headers of the response."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None = None


class OllamaErrorResponse(msgspec.Struct, frozen=True):
    """Ollama's envelope, also of the last line of a stream that failed."""

    error: str
