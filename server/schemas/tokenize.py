"""`POST /tokenize` and `POST /detokenize`, which are vLLM's: text to token ids and back, without the model."""

from typing import Annotated

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidValueError, MissingParameterError
from server.schemas.chat import Messages

MAX_TOKENS = 1 << 20


class TokenizeRequest(BaseModel):
    """A prompt as text, or messages for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="Only for messages. Default true.")
    return_token_strs: bool | None = None

    def check(self) -> None:
        """What one field says about another; raises BadRequestError."""
        if self.prompt is None and self.messages is None:
            raise MissingParameterError("prompt")
        if self.prompt is not None and self.messages is not None:
            raise InvalidValueError("Expected either 'prompt' or 'messages', but got both.", param="messages")


class TokenizeResponse(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS, fail_fast=True)]


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str
