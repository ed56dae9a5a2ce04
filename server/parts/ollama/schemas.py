"""The requests and the answers of Ollama's API, and how answers are written: whole ones, lines of JSON, errors.

https://docs.ollama.com/api. Streams are the default. Durations are in nanoseconds.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field

from server.api.chat.schemas import MAX_MESSAGES, MAX_TOOL_CALLS
from server.api.chat.writer import TokenLogprob, token_logprobs
from server.generation.choice import ChoiceDelta, ToolCallDelta
from server.generation.endpoint import Writer
from server.http.error_formats import ErrorFormat
from server.http.errors import APIError
from server.parts.conversions.answers import arguments_of, encode_lines, named_message
from server.parts.embeddings.part import MAX_INPUTS, PromptBatch, shorten
from server.schemas.answers import RequestTimings, Usage
from server.schemas.request_fields import JSONSchema, NumLogprobs, OpenObject, optional
from server.schemas.tools import MAX_TOOLS
from server.text.tokenizer import Tokenizer

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
    images: Images | None = optional("Not supported: must be null or empty.")
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaRequest(OpenObject):
    """The fields that all requests to a model have."""

    model: str = Field(description="Name of the model, with or without `:latest`.")
    keep_alive: int | float | str | None = optional(
        "For how long the model stays loaded without a request, where models are unloaded. Otherwise it is "
        "ignored, and 0 without a prompt is answered as if the model had been unloaded."
    )
    options: Annotated[dict[str, Any], Field(max_length=MAX_OPTIONS)] | None = optional(
        "Sampling options by Ollama's names; those of its runtime, such as num_ctx, are ignored."
    )


class OllamaAnswerRequest(OllamaRequest):
    """The fields of requests that generate."""

    stream: bool | None = optional("Stream the answer as lines of JSON. Default true.")
    format: Literal["", "json"] | JSONSchema | None = optional("json, or a JSON schema that the answer must follow.")
    think: bool | Literal["low", "medium", "high", "max"] | None = optional(
        "Whether the model reasons before it answers, and how much. Default: the model decides."
    )
    logprobs: bool | None = optional("Return the log probability of each output token.")
    top_logprobs: NumLogprobs | None = optional(
        "With logprobs: number of most likely tokens to return for each position."
    )


class OllamaChatRequest(OllamaAnswerRequest):
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = optional(
        "The conversation so far. Without messages, nothing is generated."
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = optional(
        "Functions that the model may call, in the form of chat completions."
    )


class OllamaGenerateRequest(OllamaAnswerRequest):
    prompt: str | None = optional("The user's message, or with raw the whole prompt. Without it, nothing is generated.")
    system: str | None = optional("System message.")
    suffix: str | None = optional("Text that follows the answer, for models with fill-in-the-middle tokens.")
    raw: bool | None = optional("Do not apply the model's chat template.")
    context: Annotated[list[int], Field(max_length=MAX_CONTEXT, fail_fast=True)] | None = optional(
        "`context` of an earlier answer, to continue its conversation."
    )
    template: str | None = optional("Not supported: must be null or empty.")
    images: Images | None = optional("Not supported: must be null or empty.")


Texts = Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)]


class OllamaEmbedRequest(OllamaRequest):
    input: str | Texts | None = optional("One or more texts.")
    truncate: bool | None = optional(
        "Truncate the end of texts that exceed the context. Default true; false: refuse them."
    )
    dimensions: int | None = Field(
        None, ge=0, description="Number of dimensions to keep; the result is rescaled to length 1. Default 0: all."
    )


class OllamaEmbeddingsRequest(OllamaRequest):
    """The older form of `OllamaEmbedRequest`."""

    prompt: str | None = optional("The text.")


class OllamaShowRequest(OpenObject):
    model: str | None = optional("Name of the model, with or without `:latest`.")
    name: str | None = optional("Deprecated alias of model.")


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


class OllamaErrorResponse(msgspec.Struct, frozen=True):
    """Ollama's envelope, also of the last line of a stream that failed."""

    error: str


def error_body(error: APIError, request_id: str | None = None) -> bytes:
    return msgspec.json.encode(OllamaErrorResponse(named_message(error)))


def error_line(error: APIError, num_events: int = 0) -> bytes:
    """Return the last line of a stream that failed."""
    return error_body(error) + b"\n"


OLLAMA_ERRORS = ErrorFormat(
    paths=re.compile("/api/"), schema=OllamaErrorResponse, body=error_body, last_events=error_line
)


def new_answer(
    body: OllamaAnswerRequest, text: str = "", thinking: str = "", calls: Sequence[OllamaToolCall] = ()
) -> OllamaAnswer:
    """Return an answer to a request, or a line of a stream."""
    if isinstance(body, OllamaChatRequest):
        message = OllamaAnswerMessage(content=text, thinking=thinking or UNSET, tool_calls=list(calls) or UNSET)
        return OllamaChatAnswer(model=body.model, created_at=time_text(), message=message)
    return OllamaGenerateAnswer(model=body.model, created_at=time_text(), response=text, thinking=thinking or UNSET)


def time_text(time: datetime | None = None) -> str:
    """Return a time in UTC, by default the present, as in RFC 3339."""
    return (time or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


@dataclass(eq=False)
class OllamaWriter(Writer):
    """Writes the one choice of an answer. A tool call is written as a whole, when it is complete."""

    tokenizer: Tokenizer
    body: OllamaAnswerRequest
    prompt_ids: Sequence[int] | None = None  # to return as `context`, with those of the answer
    explains: bool = False
    _token_ids: list[int] = field(default_factory=list, init=False)
    _open_call: ToolCallDelta | None = field(default=None, init=False)
    _finish_reason: str | None = field(default=None, init=False)

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        return encode_lines([line for delta in deltas if (line := self._line(delta)) is not None])

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        return encode_lines([self._finished(new_answer(self.body), usage, timings)])

    def failure(self, error: APIError) -> bytes:
        return error_line(error)

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType = UNSET
    ) -> OllamaAnswer:
        (delta,) = deltas
        return self._finished(self._line(delta) or new_answer(self.body), usage, timings)

    def _line(self, delta: ChoiceDelta) -> OllamaAnswer | None:
        """Return the answer with new output, or None if there is none yet."""
        calls = self._completed_calls(delta)
        self._finish_reason = delta.finish_reason
        if self.prompt_ids is not None:
            self._token_ids += delta.token_ids
        logprobs = token_logprobs(self.tokenizer, delta.positions) if self.body.logprobs else []
        if not (delta.text or delta.reasoning or calls or logprobs):
            return None
        answer = new_answer(self.body, delta.text, delta.reasoning, calls)
        answer.logprobs = logprobs or UNSET
        return answer

    def _completed_calls(self, delta: ChoiceDelta) -> list[OllamaToolCall]:
        """Return the tool calls that are complete: another part follows them, or the choice has ended."""
        completed: list[ToolCallDelta | None] = []
        for part in delta.parts:
            if self._open_call is not None and isinstance(part, ToolCallDelta) and part.index == self._open_call.index:
                self._open_call.arguments += part.arguments
                continue
            completed.append(self._open_call)
            self._open_call = replace(part) if isinstance(part, ToolCallDelta) else None
        if delta.finish_reason is not None:
            completed.append(self._open_call)
            self._open_call = None
        return [
            OllamaToolCall(call.id, OllamaFunction(call.index, call.name, arguments_of(call)))
            for call in completed
            if call is not None
        ]

    def _finished(self, answer: OllamaAnswer, usage: Usage, timings: RequestTimings | UnsetType) -> OllamaAnswer:
        """Complete the last line or the whole answer."""
        answer.done = True
        answer.done_reason = "stop" if self._finish_reason in (None, "tool_calls") else self._finish_reason
        answer.load_duration = 0  # the model was loaded before
        answer.prompt_eval_count = usage.prompt_tokens
        answer.eval_count = usage.completion_tokens
        if timings is not UNSET:
            answer.total_duration = nanoseconds(timings.wall_s)
            answer.prompt_eval_duration = nanoseconds(timings.seconds.prefill)
            answer.eval_duration = nanoseconds(timings.seconds.decode)
            answer.lightwell = timings if self.explains else UNSET
        if isinstance(answer, OllamaGenerateAnswer) and self.prompt_ids is not None:
            answer.context = [*self.prompt_ids, *self._token_ids]
        return answer


def write_embeddings(body: OllamaEmbedRequest, embeddings: PromptBatch) -> bytes:
    """Return the answer of /api/embed as JSON."""
    answer = OllamaEmbedAnswer(
        model=body.model,
        embeddings=[shorten(vector, body.dimensions or None) for vector in embeddings.vectors],
        total_duration=nanoseconds(embeddings.timings().wall_s),
        prompt_eval_count=embeddings.num_tokens,
    )
    return msgspec.json.encode(answer)


def write_embedding(embeddings: PromptBatch) -> bytes:
    """Return the answer of /api/embeddings as JSON."""
    return msgspec.json.encode(OllamaEmbeddingsAnswer(embeddings.vectors[0]))
