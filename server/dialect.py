"""What the server must know of an API to serve it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute

from server.http.error_formats import OPENAI_ERRORS, ErrorFormat
from server.http.responses import SERVER_SENT_EVENTS, StreamFormat
from server.schemas.answers import RenderedPrompt

# Of examples.
MODEL, ID = "smollm2-135m", "0f" * 16
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
BEGINNING = "Once upon a time"
EXAMPLE_PROMPT = RenderedPrompt(
    request_id=f"cmpl-{ID}-0",
    model=MODEL,
    prompt=BEGINNING,
    token_ids=[6403, 2980, 253, 655],
    max_tokens=20,
    sampling_params={"max_tokens": 20, "temperature": 1.0, "seed": None},
)


@dataclass(frozen=True)
class Operation:
    """The parts of an operation's description that FastAPI cannot derive."""

    answer: Any  # a type that msgspec encodes; None: the answer is always a stream
    example: Mapping[str, Any] | None = None  # a body that works with any model; its `model` is added
    events: Any = None  # type of the data of a stream's events
    answer_example: Any = None
    has_model: bool = True  # the body has a `model`
    reaches_engine: bool = False  # or renders what would, without sampling
    stream_format: StreamFormat = SERVER_SENT_EVENTS

    @property
    def types(self) -> list[Any]:
        return [each for each in (self.answer, self.events) if each is not None]

    @property
    def reports_generation(self) -> bool:
        """True if the answer has headers about generation."""
        return self.reaches_engine or (self.events is not None and self.example is not None)


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """An API, or a part of one. Its handlers convert requests to those of completions or of chat completions."""

    tag: str  # names the API in the OpenAPI document
    routers: Sequence[APIRouter]
    operations: Mapping[tuple[str, str], Operation]  # by path and method
    errors: ErrorFormat = OPENAI_ERRORS
    in_workers: bool  # API processes beside the coordinator answer its POST requests themselves

    def routes(self) -> Iterator[APIRoute]:
        """Yield the routes, also those that the OpenAPI document does not have."""
        for router in self.routers:
            yield from (route for route in router.routes if isinstance(route, APIRoute))
