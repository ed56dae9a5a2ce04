"""The pages for browsers: `/`, which shows the model at work, and `/docs`, which shows the OpenAPI document.

Pages and assets are public, so they hold no data: their scripts ask the API, with the key that the user enters.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from server.context import ServerContext, get_context
from server.part import Part
from server.part_table import load_module

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


async def send_document(request: Request) -> Response:
    """Answer with the OpenAPI document, which is made once."""
    app: FastAPI = request.app
    if app.openapi_schema is None:
        make_document = load_module("page", "openapi").make_document  # when all parts have been loaded
        app.openapi_schema = make_document(app, get_context(request))
    return JSONResponse(app.openapi_schema)


def _attach(context: ServerContext) -> None:
    context.routes.extend([Route("/", partial(send_page, INDEX)), Mount("/assets", Assets())])
    if context.settings.enable_docs:
        context.routes.extend([Route("/docs", partial(send_page, DOCS)), Route("/openapi.json", send_document)])


PART = Part(attach=_attach)
