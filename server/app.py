"""The web application: routes, error handlers and middleware around one `ServerContext`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp

from server.api.dialects import DIALECTS, ERROR_FORMATS, OPERATIONS, json_routes
from server.context import ServerContext
from server.http.access_control import Authentication, HostRules
from server.http.bodies import BodyReader
from server.http.error_formats import install_error_handlers
from server.http.request_middleware import Application, RequestMiddleware, RequestRules, RootPathMiddleware
from server.settings.load import is_loopback


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
    app = RequestMiddleware(app, _request_rules(context), json_routes())
    if settings.root_path:
        app = RootPathMiddleware(app, settings.root_path)
    for layer in context.layers:
        app = layer(app)
    return app


def _request_rules(context: ServerContext) -> RequestRules:
    settings = context.settings
    # Web pages cannot reach a UNIX socket.
    allows_all = "*" in {origin.rstrip("/") for origin in settings.allowed_origins}
    checks_hosts = settings.uds is None and is_loopback(settings.host) and not allows_all
    return RequestRules(
        hosts=HostRules([settings.host], settings.allowed_origins) if checks_hosts else None,
        origins=settings.allowed_origins,
        authentication=Authentication(context.api_keys, public_metrics=settings.public_metrics),
        ledger=context.ledger,
        bodies=BodyReader(settings.max_body_size, context.answers.max_bytes),
        errors=ERROR_FORMATS,
        metrics=context.metrics,
    )
