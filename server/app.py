"""The web application: routes, error handlers and middleware around one `ServerContext`.

Its APIs are in the order of the OpenAPI document: those of the core, and those of parts.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp

from server.api.admin import ADMIN
from server.api.chat.routes import CHAT
from server.api.completions.routes import COMPLETIONS
from server.context import ServerContext
from server.dialect import Operation
from server.http.access_control import Authentication, HostRules
from server.http.bodies import BodyReader
from server.http.error_formats import ErrorFormats, install_error_handlers
from server.http.request_middleware import Application, RequestMiddleware, RootPathMiddleware
from server.http.strict_json import StrictJSONRoute
from server.part import load_parts
from server.settings.load import is_loopback

DIALECTS = (COMPLETIONS, CHAT, ADMIN, *(each for part in load_parts() for each in part.dialects))

ERROR_FORMATS = ErrorFormats(dialect.errors for dialect in DIALECTS)
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    path_and_method: operation for dialect in DIALECTS for path_and_method, operation in dialect.operations.items()
}


def json_routes() -> dict[str, StrictJSONRoute]:
    """Return the routes of JSON bodies by their path, which are found without a search through all routes."""
    routes = [route for dialect in DIALECTS for route in dialect.routes()]
    return {route.path: route for route in routes if isinstance(route, StrictJSONRoute) and route.body_type is not None}


def create_app(context: ServerContext) -> Application:
    """Create the application. Its lifespan opens and closes the connection to the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for service in (*context.services, *context.workers):
            await service.start()
        yield
        for service in reversed([*context.services, *context.workers]):
            await service.close()

    app = Application(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.context = context
    for dialect in DIALECTS:
        for router in dialect.routers:
            app.include_router(router, tags=[dialect.tag])
    app.router.routes.extend(context.routes)
    install_error_handlers(app, ERROR_FORMATS, {path for path, _ in OPERATIONS if "{" not in path})
    app.layers = _layers(partial(FastAPI.__call__, app), context)
    return app


def _layers(app: ASGIApp, context: ServerContext) -> ASGIApp:
    """Return the application with the layers around it, of which a request passes the last one added first."""
    settings = context.settings
    # Web pages cannot reach a UNIX socket.
    allows_all = "*" in {origin.rstrip("/") for origin in settings.allowed_origins}
    checks_hosts = settings.uds is None and is_loopback(settings.host) and not allows_all
    app = RequestMiddleware(
        app=app,
        routes=json_routes(),
        hosts=HostRules([settings.host], settings.allowed_origins) if checks_hosts else None,
        origins=settings.allowed_origins,
        authentication=Authentication(context.api_keys, public_metrics=settings.public_metrics),
        ledger=context.ledger,
        bodies=BodyReader(settings.max_body_size, context.answers.max_bytes),
        errors=ERROR_FORMATS,
        metrics=context.metrics,
    )
    if settings.root_path:
        app = RootPathMiddleware(app, settings.root_path)
    for layer in context.layers:
        app = layer(app)
    return app
