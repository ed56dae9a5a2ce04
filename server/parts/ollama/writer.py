"""The answers of Ollama's API, and how they are written: whole ones, streams of lines of JSON, and errors.

Durations are in nanoseconds.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from server.api.chat.writer import TokenLogprob, token_logprobs
from server.generation.choice import ChoiceDelta, ToolCallDelta
from server.generation.endpoint import Writer, encode_lines
from server.http.error_formats import ErrorFormat
from server.http.errors import APIError, valid_utf8
from server.parts.embeddings.pipeline import PromptBatch, shorten
from server.parts.ollama.schemas import OllamaEmbedRequest
from server.schemas.answers import RequestTimings, Usage
from server.text.tokenizer import Tokenizer


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
    return msgspec.json.encode(OllamaErrorResponse(valid_utf8(error.named_message)))


def error_line(error: APIError, num_events: int = 0) -> bytes:
    """Return the last line of a stream that failed."""
    return error_body(error) + b"\n"


OLLAMA_ERRORS = ErrorFormat(
    paths=re.compile("/api/"), schema=OllamaErrorResponse, body=error_body, last_events=error_line
)


class MakeAnswer(Protocol):
    """Makes an answer or a line of a stream."""

    def __call__(
        self, model: str, text: str = "", thinking: str = "", calls: Sequence[OllamaToolCall] = ()
    ) -> OllamaAnswer: ...


def chat_answer(
    model: str, text: str = "", thinking: str = "", calls: Sequence[OllamaToolCall] = ()
) -> OllamaChatAnswer:
    """Return an answer of /api/chat."""
    message = OllamaAnswerMessage(content=text, thinking=thinking or UNSET, tool_calls=list(calls) or UNSET)
    return OllamaChatAnswer(model=model, created_at=time_text(), message=message)


def generate_answer(
    model: str, text: str = "", thinking: str = "", calls: Sequence[OllamaToolCall] = ()
) -> OllamaGenerateAnswer:
    """Return an answer of /api/generate, whose requests have no tools."""
    return OllamaGenerateAnswer(model=model, created_at=time_text(), response=text, thinking=thinking or UNSET)


def time_text(time: datetime | None = None) -> str:
    """Return a time in UTC, by default the present, as in RFC 3339."""
    return (time or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


class OllamaWriter(Writer):
    """Writes the one choice of an answer. A tool call is written as a whole, when it is complete."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: str,
        make_answer: MakeAnswer,
        *,
        prompt_ids: Sequence[int] | None = None,
        with_logprobs: bool = False,
        explains: bool = False,
    ) -> None:
        """Prepare the writer. `prompt_ids` are those to return as `context`, with those of the answer."""
        self._tokenizer = tokenizer
        self._model = model
        self._make_answer = make_answer
        self._prompt_ids = prompt_ids
        self._with_logprobs = with_logprobs
        self._explains = explains
        self._token_ids: list[int] = []
        self._open_call: ToolCallDelta | None = None
        self._finish_reason: str | None = None

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        return encode_lines([line for delta in deltas if (line := self._line(delta)) is not None])

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        return encode_lines([self._finished(self._make_answer(self._model), usage, timings)])

    def failure(self, error: APIError) -> bytes:
        return error_line(error)

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType = UNSET
    ) -> OllamaAnswer:
        (delta,) = deltas
        answer = self._line(delta) or self._make_answer(self._model)
        return self._finished(answer, usage, timings)

    def _line(self, delta: ChoiceDelta) -> OllamaAnswer | None:
        """Return the answer with new output, or None if there is none yet."""
        calls = self._completed_calls(delta)
        self._finish_reason = delta.finish_reason
        if self._prompt_ids is not None:
            self._token_ids += delta.token_ids
        logprobs = self._logprobs(delta)
        if not (delta.text or delta.reasoning or calls or logprobs):
            return None
        answer = self._make_answer(self._model, delta.text, delta.reasoning, calls)
        answer.logprobs = logprobs or UNSET
        return answer

    def _completed_calls(self, delta: ChoiceDelta) -> list[OllamaToolCall]:
        """Return the tool calls that are complete: another part follows them, or the choice has ended."""
        completed: list[ToolCallDelta] = []
        for part in delta.parts:
            if self._open_call is not None and isinstance(part, ToolCallDelta) and part.index == self._open_call.index:
                self._open_call.arguments += part.arguments
                continue
            completed += self._close_call()
            if isinstance(part, ToolCallDelta):
                self._open_call = ToolCallDelta(part.index, part.id, part.name, part.arguments)
        if delta.finish_reason is not None:
            completed += self._close_call()
        return [
            OllamaToolCall(call.id, OllamaFunction(call.index, call.name, call.decoded_arguments)) for call in completed
        ]

    def _close_call(self) -> list[ToolCallDelta]:
        call, self._open_call = self._open_call, None
        return [] if call is None else [call]

    def _logprobs(self, delta: ChoiceDelta) -> list[TokenLogprob]:
        return token_logprobs(self._tokenizer, delta.positions) if self._with_logprobs else []

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
            answer.lightwell = timings if self._explains else UNSET
        if isinstance(answer, OllamaGenerateAnswer) and self._prompt_ids is not None:
            answer.context = [*self._prompt_ids, *self._token_ids]
        return answer


def loaded_answer(make_answer: MakeAnswer, model: str, *, reason: str) -> OllamaAnswer:
    """Return the answer to a request without a prompt, which loads or unloads a model in Ollama."""
    answer = make_answer(model)
    answer.done, answer.done_reason = True, reason
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
