"""A route that parses JSON bodies strictly."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from server.http.errors import UnsupportedMediaTypeError
from server.http.strict_json import parse_json_object


class StrictJSONRequest(Request):
    """A request whose body is parsed by `parse_json_object`, once."""

    async def json(self) -> dict[str, Any]:
        if self._parsed is None:
            self._parsed = parse_json_object(await self.body())
        return self._parsed

    _parsed: dict[str, Any] | None = None


class StrictJSONRoute(APIRoute):
    """A route for JSON bodies. The pydantic model of its handler validates the result of `parse_json_object`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict_handler(request: Request) -> Response:
            request = StrictJSONRequest(request.scope, request.receive)
            if request.method == "POST":
                check_media_type(request.headers)
                await request.json()
                return await self.respond(request, handler)
            return await handler(request)

        return strict_handler

    async def respond(
        self, request: StrictJSONRequest, handler: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Response:
        """Answer a request that has valid JSON. `handler` validates its fields."""
        return await handler(request)


def check_media_type(headers: Headers) -> None:
    """Raise UnsupportedMediaTypeError unless the Content-Type is JSON in UTF-8."""
    media_type, *parameters = headers.get("content-type", "").lower().split(";")
    if media_type.strip() != "application/json":
        raise UnsupportedMediaTypeError(
            "The Content-Type of your request must be application/json; with curl, -H 'Content-Type: application/json'."
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise UnsupportedMediaTypeError("The body of your request must be encoded in UTF-8.")
