"""What the server must know of an API to serve it, and the routes of requests that name a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from server.context import get_context
from server.http.error_formats import OPENAI_ERRORS, ErrorFormat
from server.http.responses import SERVER_SENT_EVENTS, StreamFormat
from server.http.strict_json import StrictJSONRoute

# Of examples.
MODEL, ID = "smollm2-135m", "0f" * 16
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
BEGINNING = "Once upon a time"


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


class ModelRoute(StrictJSONRoute):
    """A route for JSON bodies that name a model. A request may have to wait until it is loaded."""

    name_fields: tuple[str, ...] = ("model",)  # those that may hold the name
    errors: ErrorFormat | None = None  # of the last events of a stream; None: it sends no server-sent events

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        when_loaded = get_context(request).models.when_loaded
        if when_loaded is None:
            return await super().respond(request, fields)
        return await when_loaded(self, request, fields)

    async def respond_loaded(self, request: Request, fields: dict[str, Any]) -> Response:
        """Answer a request whose model is loaded."""
        return await super().respond(request, fields)

    def served_name(self, request: Request, name: str) -> str:
        """Return the name of a served model for the one that the client sent."""
        return name


class StreamRoute(ModelRoute):
    """A route that can answer with server-sent events."""

    errors: ErrorFormat = OPENAI_ERRORS
