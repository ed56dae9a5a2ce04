"""Ollama's API: its requests, its answers, and the lines of its streams.

https://docs.ollama.com/api. Durations are in nanoseconds. Streams are lines of JSON, and the default.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.api.chat.schemas import MAX_MESSAGES, MAX_TOOL_CALLS, TokenLogprob
from server.parts.embeddings.schemas import MAX_INPUTS
from server.schemas.answers import RequestTimings
from server.schemas.request_fields import JSONSchema, NumLogprobs
from server.schemas.tools import MAX_TOOLS

MAX_OPTIONS = 128
MAX_IMAGES = 1024
MAX_CONTEXT = 1 << 20  # token ids of an earlier answer


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


# Requests.


class OllamaObject(BaseModel):
    """Base of the requests and the objects inside them. Undeclared fields are kept, and reported by name."""

    model_config = ConfigDict(strict=True, extra="allow")


Images = Annotated[list[Any], Field(max_length=MAX_IMAGES)]


class OllamaFunctionCall(OllamaObject):
    name: str
    arguments: dict[str, Any] = {}
    index: int | None = None


class OllamaCall(OllamaObject):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: str | None = None
    index: int | None = None
    function: OllamaFunctionCall


class OllamaMessage(OllamaObject):
    role: Annotated[
        Literal["developer", "system", "user", "assistant", "tool"],
        BeforeValidator(_lower, json_schema_input_type=Literal["system", "user", "assistant", "tool"]),
    ]
    content: str | None = None
    thinking: str | None = None
    images: Images | None = Field(None, description="Not supported: must be null or empty.")
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaRequest(OllamaObject):
    """The fields that all requests to a model have."""

    model: str = Field(description="Name of the model, with or without `:latest`.")
    keep_alive: int | float | str | None = Field(
        None,
        description="For how long the model stays loaded without a request, where models are unloaded. Otherwise it is "
        "ignored, and 0 without a prompt is answered as if the model had been unloaded.",
    )
    options: Annotated[dict[str, Any], Field(max_length=MAX_OPTIONS)] | None = Field(
        None, description="Sampling options by Ollama's names; those of its runtime, such as num_ctx, are ignored."
    )


class OllamaAnswerRequest(OllamaRequest):
    """The fields of requests that generate."""

    stream: bool | None = Field(None, description="Stream the answer as lines of JSON. Default true.")
    format: Literal["", "json"] | JSONSchema | None = Field(
        None, description="json, or a JSON schema that the answer must follow."
    )
    think: bool | Literal["low", "medium", "high", "max"] | None = Field(
        None, description="Whether the model reasons before it answers, and how much. Default: the model decides."
    )
    logprobs: bool | None = Field(None, description="Return the log probability of each output token.")
    top_logprobs: NumLogprobs | None = Field(
        None, description="With logprobs: number of most likely tokens to return for each position."
    )


class OllamaChatRequest(OllamaAnswerRequest):
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="The conversation so far. Without messages, nothing is generated."
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the model may call, in the form of chat completions."
    )


class OllamaGenerateRequest(OllamaAnswerRequest):
    prompt: str | None = Field(
        None, description="The user's message, or with raw the whole prompt. Without it, nothing is generated."
    )
    system: str | None = Field(None, description="System message.")
    suffix: str | None = Field(
        None, description="Text that follows the answer, for models with fill-in-the-middle tokens."
    )
    raw: bool | None = Field(None, description="Do not apply the model's chat template.")
    context: Annotated[list[int], Field(max_length=MAX_CONTEXT, fail_fast=True)] | None = Field(
        None, description="`context` of an earlier answer, to continue its conversation."
    )
    template: str | None = Field(None, description="Not supported: must be null or empty.")
    images: Images | None = Field(None, description="Not supported: must be null or empty.")


Texts = Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)]


class OllamaEmbedRequest(OllamaRequest):
    input: str | Texts | None = Field(None, description="One or more texts.")
    truncate: bool | None = Field(
        None, description="Truncate the end of texts that exceed the context. Default true; false: refuse them."
    )
    dimensions: int | None = Field(
        None, ge=0, description="Number of dimensions to keep; the result is rescaled to length 1. Default 0: all."
    )


class OllamaEmbeddingsRequest(OllamaRequest):
    """The older form of `OllamaEmbedRequest`."""

    prompt: str | None = Field(None, description="The text.")


class OllamaShowRequest(OllamaObject):
    model: str | None = Field(None, description="Name of the model, with or without `:latest`.")
    name: str | None = Field(None, description="Deprecated alias of model.")


# Answers.


class OllamaFunction(msgspec.Struct):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(msgspec.Struct):
    id: str
    function: OllamaFunction


class OllamaAnswerMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaToolCall] | UnsetType = UNSET


class OllamaAnswer(msgspec.Struct, kw_only=True):
    """A whole answer or a line of a stream, without its text. Only the last line has the fields after `done`."""

    model: str
    created_at: str  # RFC 3339
    done: bool = False
    done_reason: str | UnsetType = UNSET  # stop, length, load, unload, repetition or abort
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    lightwell: RequestTimings | UnsetType = UNSET


class OllamaChatAnswer(OllamaAnswer, kw_only=True):
    message: OllamaAnswerMessage


class OllamaGenerateAnswer(OllamaAnswer, kw_only=True):
    response: str = ""
    thinking: str | UnsetType = UNSET
    context: list[int] | UnsetType = UNSET  # the token ids of prompt and answer


class OllamaEmbedAnswer(msgspec.Struct, kw_only=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class OllamaEmbeddingsAnswer(msgspec.Struct):
    embedding: list[float]


class OllamaModelDetails(msgspec.Struct, frozen=True, kw_only=True):
    parent_model: str = ""  # for a LoRA adapter: the name of its base model
    format: str = ""  # gguf, safetensors; this and what follows is empty if the files cannot be read
    family: str = ""
    families: list[str] = []
    parameter_size: str = ""  # 134.52M, 8B
    quantization_level: str = ""  # Q4_1, BF16
    context_length: int = 0  # tokens
    embedding_length: int = 0


class OllamaModel(msgspec.Struct, kw_only=True):
    """A model in the lists of /api/tags and /api/ps."""

    name: str
    model: str
    modified_at: str | UnsetType = UNSET
    size: int  # bytes
    digest: str  # changes when the weights or the version of the server change
    details: OllamaModelDetails
    capabilities: list[str] | UnsetType = UNSET
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class OllamaModelList(msgspec.Struct):
    models: list[OllamaModel]


class OllamaModelInfo(msgspec.Struct, kw_only=True):
    modelfile: str
    parameters: str  # the model's default sampling settings, one a line
    template: str
    details: OllamaModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(msgspec.Struct):
    version: str  # of Ollama's API that this server follows, which clients compare with what they need
    lightwell: str
