"""The requests of Ollama's API.

https://docs.ollama.com/api. Streams are the default.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.api.chat.schemas import MAX_MESSAGES, MAX_TOOL_CALLS
from server.parts.embeddings.schemas import MAX_INPUTS
from server.schemas.request_fields import JSONSchema, NumLogprobs, OpenObject
from server.schemas.tools import MAX_TOOLS

MAX_OPTIONS = 128
MAX_IMAGES = 1024
MAX_CONTEXT = 1 << 20  # token ids of an earlier answer


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Images = Annotated[list[Any], Field(max_length=MAX_IMAGES)]


class OllamaFunctionCall(OpenObject):
    name: str
    arguments: dict[str, Any] = {}
    index: int | None = None


class OllamaCall(OpenObject):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: str | None = None
    index: int | None = None
    function: OllamaFunctionCall


class OllamaMessage(OpenObject):
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


class OllamaRequest(OpenObject):
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


class OllamaShowRequest(OpenObject):
    model: str | None = Field(None, description="Name of the model, with or without `:latest`.")
    name: str | None = Field(None, description="Deprecated alias of model.")
