"""Requests and answers of the operational endpoints: models, tokenizer and cancellation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from server.api.chat.schemas import ChatCompletionRequest, Messages, TemplateOptions
from server.http.errors import InvalidValueError, MissingParameterError
from server.models.registry import ModelState
from server.schemas.request_fields import OpenObject
from server.schemas.tools import Tools

MAX_TEXT_BYTES = 1 << 20  # of a prompt to tokenize
MAX_DETOKENIZE_TOKENS = 1 << 20
CHAT_FIELDS = frozenset(ChatCompletionRequest.model_fields) - {"prompt"}

# `GET /v1/models`: OpenAI's fields with vLLM's `root`, `parent` and `max_model_len`.


class LoadProgress(msgspec.Struct, frozen=True):
    """How far the load of a model is."""

    seconds: float  # since it was requested
    fraction: float | None  # of the time that the last load took; None: it has not been loaded before


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int  # seconds since the epoch
    owned_by: str = "lightwell"
    root: str  # for a LoRA adapter: its path
    parent: str | None = None  # for a LoRA adapter: the id of its base model
    state: ModelState
    reason: str | UnsetType = UNSET  # why it has failed
    loading: LoadProgress | UnsetType = UNSET
    max_model_len: int | None = None  # tokens. None: not known before the model is loaded, like what follows
    default_max_tokens: int | None = None  # --default-max-tokens; None: the rest of the context
    default_sampling: Mapping[str, Any] = {}  # for fields that requests leave out; others have OpenAI's defaults
    default_sampling_sources: Mapping[str, str] = {}  # where each of these comes from
    # How the model writes tool calls: the format's name; `generic` where the chat template has no form of its own, and
    # `unrecognized` where it has one that the server does not know. None: the model has no chat template.
    tool_format: str | None = None
    reasoning_format: str | None = None  # tag that begins reasoning, or `unrecognized`. None: the model does not reason


class ServerVersion(msgspec.Struct, frozen=True):
    version: str
    default_sampling: Mapping[str, Any]
    default_sampling_sources: Mapping[str, str]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


# `POST /tokenize` and `POST /detokenize`, which follow vLLM.


class TokenizeRequest(OpenObject):
    """Either a text prompt, or messages that are rendered by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="Only with messages. Default true.")
    continue_final_message: bool | None = Field(
        None, description="Only with messages, the last of which must have the role assistant."
    )
    chat_template_kwargs: TemplateOptions | None = Field(None, description="Only with messages.")
    tools: Tools | None = Field(None, description="Only with messages.")
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise BadRequestError if fields contradict each other."""
        if self.prompt is None and self.messages is None:
            raise MissingParameterError("prompt")
        if self.prompt is not None and self.messages is not None:
            raise InvalidValueError("Expected either 'prompt' or 'messages', but got both.", param="messages")
        if self.messages is not None:
            self.chat().check()

    def chat(self) -> ChatCompletionRequest:
        """Return the chat request with the same prompt. Requires `messages`."""
        shared = {name: getattr(self, name) for name in type(self).model_fields if name in CHAT_FIELDS}
        return ChatCompletionRequest.model_construct(**shared)


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What `tokenizer_config.json` says, under its names. A model from a GGUF file has no such file."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    model_max_length: int  # tokens
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    add_bos_token: bool
    chat_template: str | None


class TokenizeResponse(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(OpenObject):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_DETOKENIZE_TOKENS, fail_fast=True)]


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str


# `POST /v1/requests/{id}/cancel`.


class CancelResponse(msgspec.Struct, frozen=True):
    id: str
    cancelled: Literal[True] = True
