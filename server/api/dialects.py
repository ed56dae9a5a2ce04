"""The APIs that the server speaks, in the order of the OpenAPI document: those of the core, and those of parts."""

from collections.abc import Mapping

from server.api.admin.routes import ADMIN, MODELS, TOKENS
from server.api.chat.routes import CHAT
from server.api.completions.routes import COMPLETIONS
from server.dialect import Operation
from server.http.error_formats import ErrorFormats
from server.http.json_route import StrictJSONRoute
from server.part import load_parts

DIALECTS = (COMPLETIONS, CHAT, MODELS, *(each for part in load_parts() for each in part.dialects), ADMIN, TOKENS)

ERROR_FORMATS = ErrorFormats(dialect.errors for dialect in DIALECTS)
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    path_and_method: operation for dialect in DIALECTS for path_and_method, operation in dialect.operations.items()
}


def worker_paths() -> frozenset[str]:
    """Return the paths of the POST requests that a worker answers itself: to generate, embed, score or tokenize."""
    routes = [route for dialect in DIALECTS if dialect.in_workers for route in dialect.routes()]
    return frozenset(route.path for route in routes if "POST" in (route.methods or ()))


def json_routes() -> dict[str, StrictJSONRoute]:
    """Return the routes of JSON bodies by their path, which are found without a search through all routes."""
    routes = [route for dialect in DIALECTS for route in dialect.routes()]
    return {route.path: route for route in routes if isinstance(route, StrictJSONRoute) and route.body_type is not None}
