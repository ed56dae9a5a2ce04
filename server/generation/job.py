"""One request to generate, from its validation to the end of its answer."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from engine.shared.messages import EngineInfo
from server.context import RequestSteps, ServerContext
from server.engine_client.answer_budget import AnswerShare
from server.engine_client.reservation import Reservation
from server.generation.endpoint import AnswerMetadata, Endpoint, Writer
from server.generation.generation import Generation
from server.generation.preamble import WARNINGS, Preamble
from server.http.errors import APIError
from server.models.served_model import ModelVariant
from server.schemas.generation_request import GenerationRequest, Requested
from server.tenants import OwnedId, Tenant

Body = TypeVar("Body", bound=GenerationRequest)


@dataclass(slots=True, kw_only=True)
class Job(Generic[Body]):
    """A valid request."""

    context: ServerContext
    endpoint: Endpoint[Body]
    body: Body
    requested: Requested
    fields: Set[str]  # the names of the fields that the request or the default sampling sets
    model: ModelVariant
    info: EngineInfo
    metadata: AnswerMetadata
    ids: tuple[str, ...]  # by which the request can be cancelled and replayed
    seed: int
    arrival: float  # seconds of time.monotonic()
    request_id: str  # for logs and errors
    preamble: Preamble
    tenant: Tenant
    text_size: int  # bytes
    steps: RequestSteps

    # Once it has been submitted to the engine:
    submitted: float = 0.0  # seconds of time.monotonic()
    num_prompt_bytes: int = 0  # of the prompts' part of the answer
    headers: dict[str, str] = field(default_factory=dict)  # of the response
    reservation: Reservation = field(init=False)
    generation: Generation = field(init=False)
    writer: Writer = field(init=False)
    share: AnswerShare = field(init=False)  # of the answer
    keys: tuple[OwnedId, ...] = ()  # while it can be cancelled

    def set_headers(self, max_tokens: int) -> None:
        """Set the headers of the response, in which no choice has more than `max_tokens`."""
        is_plain = not self.preamble.ignored and not self.preamble.is_model_missing
        warnings = {} if is_plain else self.preamble.accept()
        requested, priority = self.requested.max_tokens, self.body.priority or 0
        if requested is not None and requested > max_tokens:
            capped = f"{self.endpoint.max_tokens_field(self.body)} capped at {max_tokens}, the rest of the context"
            warnings[WARNINGS] = "; ".join([*warnings.values(), capped])
        if priority < 0 and self.tenant.allowed_priority(priority) != priority:
            raised = "priority raised to 0: the API key allows no lower one"
            warnings[WARNINGS] = "; ".join([*warnings.values(), raised])
        deterministic = "true" if self.info.deterministic else "false"
        self.headers = {"x-lightwell-seed": str(self.seed), "x-lightwell-deterministic": deterministic, **warnings}

    def failure(self, error: APIError) -> bytes:
        """Return the last events of a stream that failed."""
        self.steps.fail(error)
        return self.writer.failure(error)

    def end(self) -> None:
        """End the generation. May be called again."""
        self.generation.close()
        self.context.running.remove(self.generation, self.keys)
        self.keys = ()
        self.steps.end()

    def close(self) -> None:
        """End the generation, and count its answer no longer."""
        self.share.release()
        self.end()
