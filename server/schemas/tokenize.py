"""`POST /tokenize` and `POST /detokenize`, which are vLLM's: text to token ids and back, without the model."""

from typing import Annotated

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidValueError, MissingParameterError, UnsupportedParameterError
from server.schemas.chat import ChatMessage

# Fields of vLLM that would change the tokens.
UNSUPPORTED = ("continue_final_message", "chat_template", "chat_template_kwargs", "tools", "mm_processor_kwargs")


class TokenizeRequest(BaseModel):
    """A prompt as text, or messages for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="Only for messages. Default true.")
    return_token_strs: bool | None = None

    def check(self) -> None:
        """What one field says about another; raises BadRequestError."""
        if self.prompt is None and self.messages is None:
            raise MissingParameterError("prompt")
        if self.prompt is not None and self.messages is not None:
            raise InvalidValueError("Expected either 'prompt' or 'messages', but got both.", param="messages")
        extra = self.model_extra or {}
        for name in UNSUPPORTED:
            if extra.get(name):
                raise UnsupportedParameterError(name)


class TokenizeResponse(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str
