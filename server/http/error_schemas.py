"""The envelopes of errors. In OpenAI's all four fields are always there, and `code` is never a number."""

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
    """Anthropic's envelope. As an event of a stream it has no id: the answer's headers said it."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None = None
