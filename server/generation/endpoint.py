"""What the frame asks of an endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
from msgspec import UnsetType

from server.constrained.constraints import Constraint
from server.context import ServerContext
from server.generation.choice_state import Delta
from server.generation.prompts import Prompt
from server.http.errors import APIError
from server.schemas.common import Account, GenerationRequest, Usage

Body_contra = TypeVar("Body_contra", bound=GenerationRequest, contravariant=True)


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer, and each chunk of it, says beside its choices."""

    id: str
    created: int  # seconds since the epoch
    model: str
    system_fingerprint: str


class Writer(Protocol):
    """How an endpoint writes its answer."""

    def events(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """What a stream says about additions to choices, framed; may be nothing. `usage` is that so far.

        Called first without additions, for what comes before the first token.
        """
        ...

    def end(self, usage: Usage, account: Account | UnsetType) -> bytes:
        """The end of a stream that did not fail. `account` is UNSET unless asked for."""
        ...

    def failure(self, error: APIError) -> bytes:
        """The end of one that did."""
        ...

    def answer(self, deltas: Sequence[Delta], usage: Usage, account: Account | UnsetType) -> msgspec.Struct:
        """The whole answer; each delta is all of a choice."""
        ...


class Endpoint(Protocol[Body_contra]):
    """What the endpoints differ in."""

    @property
    def noun(self) -> str:
        """What errors call the input, and the field that holds it."""
        ...

    @property
    def id_prefix(self) -> str:
        """What the ids of answers begin with."""
        ...

    def encode(self, context: ServerContext, body: Body_contra) -> list[Prompt]:
        """The prompts as token ids; raises BadRequestError. Called in a thread, for it may take long."""
        ...

    def constraint(self, context: ServerContext, body: Body_contra, prompt: Prompt) -> Constraint | None:
        """What the answer to a prompt must match; raises BadRequestError. Called in a thread."""
        ...

    def writer(self, context: ServerContext, body: Body_contra, head: Head, prompts: Sequence[Prompt]) -> Writer: ...
