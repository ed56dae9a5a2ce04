"""`POST /tokenize` and `POST /detokenize`, which are vLLM's: text to token ids and back, without the model."""

from typing import Annotated

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from server.api.chat.schemas import ChatCompletionRequest, Messages, TemplateOptions
from server.http.errors import InvalidValueError, MissingParameterError
from server.schemas.tools import Tools

MAX_TOKENS = 1 << 20
CHAT_FIELDS = frozenset(ChatCompletionRequest.model_fields) - {"prompt"}


class TokenizeRequest(BaseModel):
    """A prompt as text, or messages for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="Only for messages. Default true.")
    continue_final_message: bool | None = Field(None, description="Only for messages, with an assistant's at the end.")
    chat_template_kwargs: TemplateOptions | None = Field(None, description="Only for messages.")
    tools: Tools | None = Field(None, description="Only for messages.")
    return_token_strs: bool | None = None

    def check(self) -> None:
        """What one field says about another; raises BadRequestError."""
        if self.prompt is None and self.messages is None:
            raise MissingParameterError("prompt")
        if self.prompt is not None and self.messages is not None:
            raise InvalidValueError("Expected either 'prompt' or 'messages', but got both.", param="messages")
        if self.messages is not None:
            self.chat().check()

    def chat(self) -> ChatCompletionRequest:
        """The request whose prompt is asked for, if there are messages."""
        shared = {name: getattr(self, name) for name in type(self).model_fields if name in CHAT_FIELDS}
        return ChatCompletionRequest.model_construct(**shared)


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
