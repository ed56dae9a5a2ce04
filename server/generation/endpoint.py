"""The interface between the generation pipeline and the APIs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
from msgspec import UnsetType

from server.generation.choice import ChoiceDelta
from server.generation.prompts import Prompt
from server.http.errors import APIError
from server.models.served_model import ServedModel
from server.schemas.answers import RequestTimings, Usage
from server.schemas.generation_request import GenerationRequest

Body_contra = TypeVar("Body_contra", bound=GenerationRequest, contravariant=True)


@dataclass(frozen=True)
class AnswerMetadata:
    """The fields of an answer, and of each chunk of it, that do not depend on its choices."""

    id: str
    created: int  # seconds since the epoch
    model: str
    system_fingerprint: str


class Writer(Protocol):
    """Writes the answer to one request in an API's format."""

    @property
    def repeats_output(self) -> bool:
        """True if the last events of a stream have the whole output once more, so that it stays in memory."""
        ...

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        """Return the encoded events for new output, or b"" if there are none. `usage` returns the usage so far.

        The first call has no deltas; it returns the events that precede the first token.
        """
        ...

    def end(self, usage: Usage, timings: RequestTimings | UnsetType) -> bytes:
        """Return the last events of a successful stream. `timings` is UNSET unless requested."""
        ...

    def failure(self, error: APIError) -> bytes:
        """Return the last events of a stream that failed."""
        ...

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType
    ) -> msgspec.Struct:
        """Return the answer of a request without streaming. Each delta holds a complete choice."""
        ...


class Endpoint(Protocol[Body_contra]):
    """The steps of the pipeline that differ between endpoints."""

    @property
    def noun(self) -> str:
        """Name of the input in error messages, and of the field that holds it."""
        ...

    @property
    def id_prefix(self) -> str:
        """Prefix of the ids of answers."""
        ...

    @property
    def operation(self) -> str:
        """`gen_ai.operation.name` of its spans."""
        ...

    def max_tokens_field(self, body: Body_contra) -> str:
        """Return the name of the field with the maximum number of output tokens that the client sent."""
        ...

    def ignored_fields(self, model: ServedModel, body: Body_contra) -> list[str]:
        """Return the names of fields without effect, apart from undeclared top-level ones."""
        ...

    def encode(self, model: ServedModel, body: Body_contra, *, limit: int | None = None) -> list[Prompt]:
        """Return the tokenized prompts. May be slow; called in a thread.

        Raises BadRequestError, before tokenizing if a long text certainly has more tokens than `limit`.
        """
        ...

    def writer(
        self, model: ServedModel, body: Body_contra, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> Writer: ...
