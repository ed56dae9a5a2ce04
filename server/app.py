"""The web application: routes, error handlers and middleware around one `ServerContext`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.admin import health, lora_adapters, metrics_page, models, requests, tokenize, usage
from server.api.chat import routes as chat
from server.api.completions import routes as completions
from server.api.embeddings import routes as embeddings
from server.api.inspection import events, inspect, trace
from server.api.inspection import routes as inspection
from server.api.messages import routes as messages
from server.api.ollama import routes as ollama
from server.api.openapi import OPERATIONS, install_document
from server.api.rerank import routes as rerank
from server.api.responses import routes as responses
from server.api.responses.store import ResponseStore
from server.context import ServerContext
from server.coordination.forwarded_requests import ForwardingMiddleware
from server.http.access_control import Authentication, HostRules
from server.http.bodies import BodyReader
from server.http.error_handlers import install_error_handlers
from server.http.json_route import StrictJSONRoute
from server.http.request_middleware import RequestMiddleware, RequestRules, RootPathMiddleware
from server.settings.load import is_loopback
from server.web.pages import page_routes

OPENAI = (completions, chat, responses, embeddings, rerank, models)
LIGHTWELL = (inspection, events, inspect, trace, requests, usage, lora_adapters, tokenize, health, metrics_page)
ROUTERS: dict[str, list[APIRouter]] = {  # by the tag of their API
    "OpenAI": [*(module.router for module in OPENAI), responses.json_router],
    "Anthropic": [messages.router],
    "Ollama": [ollama.router, ollama.file_router, ollama.file_operations],
    "Lightwell": [*(module.router for module in LIGHTWELL), tokenize.json_router],
}


class Application(FastAPI):
    """FastAPI behind the server's own layers, which answer most POST requests without it."""

    layers: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.layers(scope, receive, send)


def create_app(context: ServerContext) -> Application:
    """Create the application. Its lifespan opens and closes the connection to the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in context.models.loaded:
            await model.client.start()
        if context.model_manager is not None:
            await context.model_manager.start()
        for worker in context.workers:
            worker.start()
        yield
        for worker in context.workers:
            await worker.close()
        if context.model_manager is not None:
            await context.model_manager.close()
        for model in context.models.loaded:
            await model.close()
        if context.tracer is not None:
            await context.tracer.close()

    with_docs = context.settings.enable_docs
    app = Application(
        title="Lightwell",
        lifespan=lifespan,
        openapi_url="/openapi.json" if with_docs else None,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        servers=[{"url": context.settings.root_path}] if context.settings.root_path else None,
    )
    install_document(app, context.models.name, needs_key=context.settings.needs_key)
    app.state.context = context
    app.state.response_store = ResponseStore(
        context.settings.max_stored_responses, context.settings.stored_responses_memory
    )
    for tag, routers in ROUTERS.items():
        for router in routers:
            app.include_router(router, tags=[tag])
    app.router.routes.extend(page_routes(with_docs=with_docs))
    install_error_handlers(app, {path for path, _ in OPERATIONS if "{" not in path})
    app.layers = _layers(partial(FastAPI.__call__, app), context)
    return app


def generation_paths() -> frozenset[str]:
    """Return the paths of the requests that a worker answers itself: those to generate, embed, score or tokenize."""
    routers = [module.router for module in (completions, chat, messages, ollama, embeddings, rerank)]
    every = chain.from_iterable(router.routes for router in (*routers, tokenize.json_router))
    routes = [route for route in every if isinstance(route, APIRoute)]
    return frozenset(route.path for route in routes if "POST" in (route.methods or ()))


def _json_routes() -> dict[str, StrictJSONRoute]:
    """Return the routes of JSON bodies by their path, which are found without a search through all routes."""
    every = [route for routers in ROUTERS.values() for router in routers for route in router.routes]
    return {route.path: route for route in every if isinstance(route, StrictJSONRoute) and route.body_type is not None}


def _layers(app: ASGIApp, context: ServerContext) -> ASGIApp:
    """Return the application with the layers around it, of which a request passes the last one added first."""
    settings = context.settings
    app = RequestMiddleware(app, _request_rules(context), _json_routes())
    if settings.root_path:
        app = RootPathMiddleware(app, settings.root_path)
    if context.forwarder is not None:
        paths = {prefix + path for prefix in ("", settings.root_path) for path in generation_paths()}
        app = ForwardingMiddleware(app, paths, context.forwarder)
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
        metrics=context.metrics,
    )
