"""The interface between the generation pipeline and the APIs, and what the writers of several APIs share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from engine.shared.messages import TokenLogprobs
from server.generation.choice import ChoiceDelta, json_logprob
from server.generation.prompts import Prompt
from server.http.errors import APIError
from server.http.responses import error_event
from server.models.served_model import ServedModel
from server.schemas.answers import PromptLogprob, PromptLogprobs, RequestTimings, Usage, encoded
from server.schemas.generation_request import GenerationRequest
from server.text.choice_text import token_text
from server.text.tokenizer import Tokenizer


class TokenFields:
    """Computes vLLM's optional fields of an answer: token ids, and log probabilities of the prompt.

    Each is UNSET unless requested.
    """

    def __init__(self, body: GenerationRequest | None = None, prompts: Sequence[Prompt] = ()) -> None:
        self._prompts = prompts
        self._num_choices = 1 if body is None else body.requested().num_returned_choices  # per prompt
        self._with_ids = body is not None and bool(body.return_token_ids)
        self._as_ids = body is not None and bool(body.return_tokens_as_token_ids)
        self._num_top = None if body is None else body.prompt_logprobs

    def token_name(self, tokenizer: Tokenizer, token_id: int) -> str:
        """Return how a token is written in log probabilities: its text, or `token_id:N` if requested."""
        return f"token_id:{token_id}" if self._as_ids else token_text(tokenizer, token_id)

    def token_ids(self, delta: ChoiceDelta) -> list[int] | UnsetType:
        return delta.token_ids if self._with_ids else UNSET

    def prompt_token_ids(self, index: int) -> list[int] | UnsetType:
        """Return the token ids of the prompt of the choice at `index`."""
        return self._prompt(index).token_ids if self._with_ids else UNSET

    def prompt_logprobs(self, tokenizer: Tokenizer, index: int) -> PromptLogprobs | UnsetType:
        """Return the log probabilities of the prompt of the choice at `index`, with None for the first token.

        Only called once the engine has computed them.
        """
        if self._num_top is None:
            return UNSET
        prompt = self._prompt(index)
        entries = zip(prompt.token_ids[1:], prompt.logprobs, strict=True)
        alternatives = (_alternatives(tokenizer, token_id, logprobs, self._num_top) for token_id, logprobs in entries)
        return [None, *map(encoded, alternatives)]

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self._num_choices]


def _alternatives(
    tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, num_top: int
) -> dict[int, PromptLogprob]:
    """Return the most likely tokens, and the prompt's own token if it is not one of them."""

    def entry(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(json_logprob(logprob), rank, token_text(tokenizer, token_id))

    logprobs = logprobs.keep_top(num_top)
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    ranked = {token_id: entry(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, start=1)}
    return ranked | {token_id: entry(token_id, logprobs.logprob, logprobs.rank)}


NO_FIELDS = TokenFields()
REQUEST_FIELDS = frozenset({"return_token_ids", "return_tokens_as_token_ids", "prompt_logprobs"})


Body = TypeVar("Body", bound=GenerationRequest)


@dataclass(frozen=True)
class AnswerMetadata:
    """The fields of an answer, and of each chunk of it, that do not depend on its choices."""

    id: str
    created: int  # seconds since the epoch
    model: str
    system_fingerprint: str


class Writer(ABC):
    """Writes the answer to one request in an API's format."""

    repeats_output = False  # whether the last events of a stream have the whole output again: it stays in memory

    @abstractmethod
    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        """Return the encoded events for new output, or b"" if there are none. `usage` returns the usage so far.

        The first call has no deltas; it returns the events that precede the first token.
        """

    @abstractmethod
    def end(self, usage: Usage, timings: RequestTimings | UnsetType) -> bytes:
        """Return the last events of a successful stream. `timings` is UNSET unless requested."""

    @abstractmethod
    def failure(self, error: APIError) -> bytes:
        """Return the last events of a stream that failed."""

    @abstractmethod
    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType
    ) -> msgspec.Struct:
        """Return the answer of a request without streaming. Each delta holds a complete choice."""


class Endpoint(ABC, Generic[Body]):
    """The steps of the pipeline that differ between endpoints."""

    noun: str  # the name of the input in error messages, and of the field that holds it
    id_prefix: str  # of the ids of answers
    operation: str  # `gen_ai.operation.name` of its spans

    def max_tokens_field(self, body: Body) -> str:
        """Return the name of the field with the maximum number of output tokens that the client sent."""
        return "max_tokens"

    def ignored_fields(self, model: ServedModel, body: Body) -> list[str]:
        """Return the names of fields without effect, apart from undeclared top-level ones."""
        return []

    @abstractmethod
    def encode(self, model: ServedModel, body: Body, *, limit: int | None = None) -> list[Prompt]:
        """Return the tokenized prompts. May be slow; called in a thread.

        Raises BadRequestError, before tokenizing if a long text certainly has more tokens than `limit`.
        """

    @abstractmethod
    def writer(self, model: ServedModel, body: Body, metadata: AnswerMetadata, prompts: Sequence[Prompt]) -> Writer:
        """Return what writes the answer."""


DONE = b"data: [DONE]\n\n"

# Some clients split lines at U+0085, U+2028 and U+2029, which JSON allows unescaped.
LINE_ENDS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")


class Chunk(Protocol):
    """The fields that a ChunkWriter sets in OpenAI's chunks."""

    usage: Usage | UnsetType | None
    lightwell: RequestTimings | UnsetType


class ChunkWriter(Writer):
    """Writes a stream of OpenAI's form: chunks, a last chunk with the usage if requested, and [DONE]."""

    def __init__(
        self, tokenizer: Tokenizer, metadata: AnswerMetadata, body: GenerationRequest, prompts: Sequence[Prompt]
    ) -> None:
        self._tokenizer = tokenizer
        self._envelope: dict[str, Any] = vars(metadata)
        has_fields = not REQUEST_FIELDS.isdisjoint(body.model_fields_set)
        self._fields = TokenFields(body, prompts) if has_fields else NO_FIELDS
        self._started: set[int] = set()  # indices of choices whose first chunk was written
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = self._include_usage and options is not None and bool(options.continuous_usage_stats)

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> Sequence[Chunk]:
        """Return the chunks for new output of a choice. Called in the order of the output."""

    @abstractmethod
    def usage_chunk(self) -> Chunk:
        """Return a chunk without choices, for the usage and the timings."""

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        if not deltas:
            return b""
        chunks = [chunk for delta in deltas for chunk in self.chunks(delta)]
        if self._include_usage:
            so_far = usage() if self._continuous else None
            for chunk in chunks:
                chunk.usage = so_far
        return encode_chunks(chunks)

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        if not self._include_usage and timings is UNSET:
            return DONE
        last = self.usage_chunk()
        last.usage = usage if self._include_usage else UNSET
        last.lightwell = timings
        return encode_chunks([last]) + DONE

    def failure(self, error: APIError) -> bytes:
        return error_event(error)


def encode_chunks(chunks: Sequence[Chunk]) -> bytes:
    """Encode chunks as server-sent events without event names."""
    events = b"".join([b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks])
    return events if events.isascii() else escape_line_ends(events)


def escape_line_ends(events: bytes) -> bytes:
    for char, escape in LINE_ENDS:
        events = events.replace(char, escape)
    return events
