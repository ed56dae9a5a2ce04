"""How the APIs write errors: as the body of an answer, and at the end of a stream that fails."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from server.http.error_schemas import ErrorResponse
from server.http.errors import APIError
from server.http.sse import error_event


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFormat:
    """The format of one API's errors. The defaults are OpenAI's."""

    paths: re.Pattern[str] = re.compile("(?!)")  # with which the paths of its requests begin
    header: bytes | None = None  # that all clients of the API send, and no others
    schema: type[msgspec.Struct] = ErrorResponse  # of the body
    body: Callable[[APIError, str | None], bytes] = lambda error, request_id: error.body()
    last_events: Callable[[APIError, int], bytes] = lambda error, num_events: error_event(error)  # after so many
    id_headers: tuple[str, ...] = ("x-request-id",)  # that have the request's id


OPENAI_ERRORS = ErrorFormat()


class ErrorFormats:
    """Finds the format of a request's errors. A header decides before a path."""

    def __init__(self, formats: Iterable[ErrorFormat]) -> None:
        self._formats = sorted(dict.fromkeys(formats), key=lambda each: each.header is None)

    def find(self, scope: Scope) -> ErrorFormat:
        """Return the format that a request expects; OpenAI's, if it uses no other API."""
        headers = {name for name, _ in scope["headers"]}
        for format in self._formats:
            if format.header in headers or format.paths.match(scope["path"]):
                return format
        return OPENAI_ERRORS

    def response(self, error: APIError, scope: Scope) -> Response:
        """Return the answer to a request that failed. The error no longer holds the frames that hold it."""
        body = self.find(scope).body(error.with_traceback(None), scope.get("state", {}).get("request_id"))
        return Response(body, error.status, error.headers, media_type="application/json")
