"""Requests with JSON bodies: their strict parser, and the routes that take them and end with their client.

The parser is stricter than most: UTF-8 only, no NaN or Infinity, no numbers beyond float64, no lone surrogates, an
object at the top level, and limits on depth, fields and number of values. The last value of a repeated key counts.
"""

import json
import re
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import cached_property
from typing import Any, get_type_hints

import msgspec
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from server.http.errors import InvalidJSONError, InvalidValueError, UnsupportedMediaTypeError
from server.http.validation import format_path, from_validation_error

MAX_DEPTH = 100
MAX_NODES = 100_000  # arrays, objects and keys
MAX_FIELDS = 1000  # of the object at the top level; each that is unknown is looked at and named
MAX_ELEMENTS = 1 << 20  # of all arrays and objects together; a prompt may have several hundred thousand token ids
MAX_UNCHECKED = MAX_NODES  # bytes of a body that cannot exceed the limits on nodes and elements
CONTAINERS = (dict, list)
MAX_SEARCHED = 1 << 20  # bytes of an invalid body that is searched for lone surrogates

_MALFORMED = re.compile(r"JSON is malformed: (?P<problem>.+) \(byte (?P<byte>\d+)\)")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a body.

    Raises:
        InvalidJSONError: the body is not valid JSON, or exceeds a limit.
        InvalidValueError: a string contains a lone surrogate; `param` is its path.
    """
    if len(body) > MAX_UNCHECKED and (problem := describe_size([body])) is not None:  # it would block other requests
        raise InvalidJSONError(f"the body has {problem}.")
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidJSONError("the body is not valid UTF-8.") from None
    except RecursionError:
        raise InvalidJSONError(f"the body is nested more than {MAX_DEPTH} levels deep.") from None
    except msgspec.DecodeError as error:
        check_surrogates(body)
        raise InvalidJSONError(f"the body is not valid JSON: {describe_error(str(error), body)}.") from None
    if not isinstance(value, dict):
        raise InvalidJSONError("the body must be a JSON object.")
    if len(value) > MAX_FIELDS:
        raise InvalidJSONError(f"the body has more than {MAX_FIELDS} fields.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise InvalidJSONError(f"the body is nested more than {MAX_DEPTH} levels deep.")
    return value


def describe_error(error: str, body: bytes) -> str:
    """Return msgspec's error about a body in words, with the line and the column, which count from 1."""
    match = _MALFORMED.fullmatch(error)
    if match is None:
        return "a number is out of range" if "out of range" in error else f"it ends too early, {position(body, None)}"
    return f"{match['problem']}, {position(body, int(match['byte']))}"


def position(body: bytes, offset: int | None) -> str:
    """Return the line and the column of a byte, or of the end."""
    before = body[:offset]
    line, start = before.count(b"\n") + 1, before.rfind(b"\n") + 1
    return f"line {line} column {len(before[start:].decode(errors='replace')) + 1}"


def describe_size(texts: Sequence[bytes]) -> str | None:
    """Return which limit several JSON texts exceed together, or None if they exceed none."""
    if sum(map(_count_nodes, texts)) <= MAX_NODES and sum(text.count(b",") for text in texts) <= MAX_ELEMENTS:
        return None  # even with those inside of strings
    num_nodes = num_elements = 0
    for text in map(_outside_strings, texts):
        num_nodes += _count_nodes(text)
        num_elements += text.count(b",")  # the first of each array or object does not count
        if num_nodes > MAX_NODES:
            return f"more than {MAX_NODES} arrays, objects and keys"
        if num_elements > MAX_ELEMENTS:
            return f"arrays with more than {MAX_ELEMENTS} elements"
    return None


def _outside_strings(text: bytes) -> bytes:
    """Return a JSON text without its strings. The last one may be unterminated.

    Before each string is a bracket, a comma or a colon. So no more strings are removed than the limits allow of these.
    """
    pieces = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 2 * (MAX_NODES + MAX_ELEMENTS + 1))
    return b"".join(pieces[::2])


def _count_nodes(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{") + body.count(b":")


def is_deeper(value: object, limit: int) -> bool:
    """Return whether arrays and objects are nested more than `limit` levels deep."""
    level = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent) if type(child) in CONTAINERS]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_surrogates(body: bytes) -> None:
    """Raise InvalidValueError with the path of a string that contains a lone surrogate.

    It only improves the message: the body is already known to be invalid.
    """
    if len(body) > MAX_SEARCHED or not _SURROGATE_ESCAPE.search(body):
        return
    try:
        path = find_surrogate(json.loads(body))
    except (ValueError, RecursionError):
        return
    if path is not None:
        param = format_path(path)
        raise InvalidValueError(f"Invalid '{param}': the string contains a lone surrogate.", param=param or None)


def find_surrogate(value: object) -> list[int | str] | None:
    """Return the path of the first string that UTF-8 cannot encode, or of the object that has it as a key."""
    if isinstance(value, str):
        return None if _is_encodable(value) else []
    if isinstance(value, dict) and not all(map(_is_encodable, value)):
        return []
    items: Iterable[tuple[int | str, object]] = value.items() if isinstance(value, dict) else ()
    for key, child in enumerate(value) if isinstance(value, list) else items:
        if (path := find_surrogate(child)) is not None:
            return [key, *path]
    return None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
