"""The pages for browsers: `/`, which shows the model at work, and `/docs`, which shows the OpenAPI document.

Pages and assets are public, so they hold no data: their scripts ask the API, with the key that the user enters. The
document is FastAPI's description of routes and requests, which are pydantic models, completed with examples, and with
answers, which are msgspec structs.
"""

import importlib.metadata
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from server.context import ServerContext, get_context
from server.dialect import Dialect, Operation
from server.part import Part

PREFIX = "answer."  # of component names, which would collide with those of requests
DESCRIPTION = "Language models over HTTP, compatible with clients of the APIs of OpenAI, Anthropic and Ollama."
STATIC = Path(__file__).parent / "static"
INDEX, DOCS = "index.html", "docs.html"
HEADERS: Mapping[str, str] = {
    "cache-control": "no-cache",  # browsers ask whether their copy is current, so an update shows at once
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_document(app: FastAPI, context: ServerContext) -> dict[str, Any]:
    """Return the document of an application. Its examples use the first model."""
    from server.app import DIALECTS  # when all parts have been loaded

    version, root_path = importlib.metadata.version("lightwell"), context.settings.root_path
    servers: list[dict[str, str | Any]] | None = [{"url": root_path}] if root_path else None
    document = get_openapi(
        title="Lightwell", version=version, description=DESCRIPTION, routes=app.routes, servers=servers
    )
    described_by = {path: dialect for dialect in DIALECTS for path, _ in dialect.operations}
    operations = [operation for dialect in DIALECTS for operation in dialect.operations.values()]
    types = [type for each in operations for type in (each.answer, each.events) if type is not None]
    types += dict.fromkeys(dialect.errors.schema for dialect in DIALECTS)
    template = "#/components/schemas/" + PREFIX + "{name}"
    schemas, components = msgspec.json.schema_components(types, ref_template=template)
    components = _without_encoded(components)
    described = {repr(type): schema for type, schema in zip(types, schemas, strict=True)}
    for path, methods in document["paths"].items():
        dialect: Dialect = described_by[path]
        error = described[repr(dialect.errors.schema)]
        for method, described_operation in methods.items():
            operation = dialect.operations[path, method]
            described_operation["responses"] = _responses(operation, described, error)
            if operation.example is not None:
                content = described_operation["requestBody"]["content"]["application/json"]
                model = {"model": context.models.name} if operation.has_model else {}
                content["example"] = {**model, **operation.example}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's error formats, which are not used
        del document["components"]["schemas"][name]
    document["components"]["schemas"] |= {PREFIX + name: schema for name, schema in components.items()}
    if context.settings.needs_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
    return document


def _without_encoded(schema: Any) -> Any:
    """Return a schema without the alternatives for parts that are encoded beforehand: those are like the others."""
    if isinstance(schema, list):
        return [_without_encoded(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    fields = {name: _without_encoded(value) for name, value in schema.items()}
    if {} not in fields.get("anyOf", ()):
        return fields
    others = [each for each in fields.pop("anyOf") if each]
    return fields | (others[0] if len(others) == 1 else {"anyOf": others})


def _header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


REQUEST_ID_HEADER = {"x-request-id": _header("The x-request-id of the request, or a generated one.", required=True)}
GENERATION_HEADERS = {
    "x-lightwell-seed": _header("The seed used for sampling.", pattern="^-?[0-9]+$"),
    "x-lightwell-deterministic": _header(
        "Whether the answer is independent of other requests.", enum=["true", "false"]
    ),
    "x-lightwell-warnings": _header("Ignored parameters: unknown ones, and those without effect."),
}
ERROR_HEADERS = {
    "retry-after": _header("With 429 and 503: seconds to wait before retrying.", pattern="^[0-9]+$"),
    "www-authenticate": _header("With 401: the authentication scheme to use."),
}


def _responses(operation: Operation, described: Mapping[str, Any], error: Mapping[str, Any]) -> dict[str, Any]:
    kind = "text/plain" if operation.answer is str else "application/json"
    content = {} if operation.answer is None else {kind: {"schema": described[repr(operation.answer)]}}
    if operation.answer_example is not None:
        content[kind]["example"] = msgspec.to_builtins(operation.answer_example)
    description = "The answer."
    if operation.events is not None:
        content[operation.stream_format.media_type] = {"schema": described[repr(operation.events)]}
        description = "The answer; with `stream`, events whose data has the given schema."
    if operation.answer is None:
        description = "Events whose data has the given schema."
    headers = REQUEST_ID_HEADER
    if operation.reaches_engine or (operation.events is not None and operation.example is not None):
        headers = headers | GENERATION_HEADERS
    error_response = {
        "description": "An error.",
        "headers": REQUEST_ID_HEADER | ERROR_HEADERS,
        "content": {"application/json": {"schema": error}},
    }
    response = {"description": description, "headers": headers, "content": content}
    return {"200": response, "4XX": error_response, "5XX": error_response}


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
        app.openapi_schema = make_document(app, get_context(request))
    return JSONResponse(app.openapi_schema)


def _attach(context: ServerContext) -> None:
    context.routes.extend([Route("/", partial(send_page, INDEX)), Mount("/assets", Assets())])
    if context.settings.enable_docs:
        context.routes.extend([Route("/docs", partial(send_page, DOCS)), Route("/openapi.json", send_document)])


PART = Part(attach=_attach)
