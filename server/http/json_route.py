"""A route that parses and validates JSON bodies itself, strictly and once, and ends with its client."""

from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from server.http.errors import UnsupportedMediaTypeError
from server.http.strict_json import parse_json_object
from server.http.validation import from_validation_error

JSON_TYPES = frozenset({b"application/json", b"application/json; charset=utf-8"})  # the usual ones
NO_JSON = "The Content-Type of your request must be application/json; with curl, -H 'Content-Type: application/json'."
EXCHANGE = "exchange"  # in the scope's state: the `Exchange` of `server.http.request_middleware`
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")


def end_with_client(scope: Scope) -> None:
    """Cancel what answers a request when its client disconnects."""
    if (exchange := scope.get("state", {}).get(EXCHANGE)) is not None:
        exchange.end_with_client()


class StrictJSONRoute(APIRoute):
    """A route whose handler takes a request and its body: the fields of a pydantic model, or nothing.

    `RequestMiddleware` asks it without a search through all routes, if it knows it.

    A handler is cancelled when the client disconnects, if `ends_with_client`.
    """

    ends_with_client = True

    @cached_property
    def body_type(self) -> type[BaseModel] | None:
        """The model of the body; None if the handler takes none."""
        found: type[BaseModel] | None = get_type_hints(self.endpoint).get("body")
        return found

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request for which the application has found this route."""
        return super().get_route_handler() if self.body_type is None else self._answer_found

    async def _answer_found(self, request: Request) -> Response:
        if self.ends_with_client:
            end_with_client(request.scope)
        return await self.answer(request)

    async def answer(self, request: Request) -> Response:
        """Answer a request. The caller cancels it when the client disconnects. Raises APIError."""
        content_type = next((value for name, value in request.scope["headers"] if name == b"content-type"), b"")
        if content_type not in JSON_TYPES:
            self.check_media_type(request, content_type)
        return await self.respond(request, parse_json_object(await request.body()))

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        """Answer a request whose body has valid JSON. Raises APIError."""
        response: Response = await self.endpoint(request, self.validate(fields))
        return response

    def check_media_type(self, request: Request, content_type: bytes) -> None:
        """Raise UnsupportedMediaTypeError unless the Content-Type is JSON in UTF-8."""
        media_type, *parameters = content_type.lower().split(b";")
        if media_type.strip() != b"application/json":
            raise UnsupportedMediaTypeError(NO_JSON)
        for parameter in parameters:
            name, _, value = parameter.partition(b"=")
            if name.strip() == b"charset" and value.strip().strip(b'"') not in CHARSETS:
                raise UnsupportedMediaTypeError("The body of your request must be encoded in UTF-8.")

    def validate(self, fields: dict[str, Any]) -> BaseModel:
        """Return the body. Raises BadRequestError."""
        assert self.body_type is not None
        try:
            return self.body_type.model_validate(fields)
        except ValidationError as error:
            errors: list[dict[str, Any]] = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            raise from_validation_error(errors, fields) from None
