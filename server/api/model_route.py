"""Routes whose requests name a model."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.context import get_context
from server.http.error_formats import OPENAI_ERRORS, ErrorFormat
from server.http.json_route import StrictJSONRoute


class ModelRoute(StrictJSONRoute):
    """A route for JSON bodies that name a model. A request may have to wait until it is loaded."""

    name_fields: tuple[str, ...] = ("model",)  # those that may hold the name
    errors: ErrorFormat | None = None  # of the last events of a stream; None: it sends no server-sent events

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        when_loaded = get_context(request).source.when_loaded
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
