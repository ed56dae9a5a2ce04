"""The pages for browsers: `/`, which shows the model at work, and `/docs`, the API's documentation.

Pages and assets are public, so they hold no data: their scripts ask the API, with the key that the user enters.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"
INDEX, DOCS = "index.html", "docs.html"
HEADERS: Mapping[str, str] = {
    "cache-control": "no-cache",  # browsers ask whether their copy is current, so an update shows at once
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Assets(StaticFiles):
    """Scripts and styles of the pages, and those of Swagger UI, with the headers of the pages."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC, packages=[("fastapi_swagger", "resources")])

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


async def send_page(file: str, _request: Request) -> Response:
    """Answer with a page."""
    return FileResponse(STATIC / file, headers=HEADERS)


def page_routes(*, with_docs: bool) -> list[BaseRoute]:
    """Return the routes of the pages and their assets."""
    pages = {"/": INDEX, "/docs": DOCS} if with_docs else {"/": INDEX}
    routes: list[BaseRoute] = [Route(path, partial(send_page, file)) for path, file in pages.items()]
    return [*routes, Mount("/assets", Assets())]
