"""Health endpoints for load balancers and orchestrators. They answer from memory, in any state, without an API key.

`/health` and `/readyz` report whether to send requests to this server; `/healthz` whether to keep the process alive.
"""

import msgspec
from fastapi import APIRouter, Request, Response

from server.context import ServerContext, get_context
from server.engine_client.client import EngineClient
from server.http.errors import EngineUnavailableError
from server.http.json_response import StructResponse

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Return 200 while the engine's step loop and the work on texts make progress. The path is vLLM's."""
    context = get_context(request)
    return _answer(context, is_ok=_makes_progress(context))


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive(request: Request) -> Response:
    """Return 200 while the model loads, or the engine runs or is being restarted; 503 once it is dead or hangs."""
    context = get_context(request)
    return _answer(context, is_ok=context.models.default.client.is_alive)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Return 200 while new requests are admitted."""
    context = get_context(request)
    return _answer(
        context, is_ok=_makes_progress(context) and not context.models.default.client.drain_requested.is_set()
    )


def _makes_progress(context: ServerContext) -> bool:
    return context.models.default.client.is_healthy and not context.text_threads.is_stuck


def _answer(context: ServerContext, *, is_ok: bool) -> Response:
    client = context.models.default.client
    if is_ok:
        return StructResponse({"status": "ok", "restarts": client.num_restarts} | _engines(client))
    if client.restarting_since is not None:
        return _restarting(client, client.restarting_since)
    if client.dead_reason is not None:
        return EngineUnavailableError("The engine has stopped.").response()
    if not client.is_ready:
        return EngineUnavailableError("The model is still being loaded.").response()
    if client.drain_requested.is_set():
        return EngineUnavailableError("The server is shutting down.").response()
    if client.is_healthy:
        return EngineUnavailableError("The work on texts makes no progress.").response()
    return EngineUnavailableError("The engine does not respond.").response()


def _restarting(client: EngineClient, since: float) -> Response:
    """Return an error that also says since when (Unix time) the engine is being restarted, and how often it was."""
    error = EngineUnavailableError("The engine died and is being restarted.")
    state = {"status": "restarting", "since": int(since), "restarts": client.num_restarts} | _engines(client)
    return StructResponse(state | msgspec.json.decode(error.body()), error.status, error.headers)


def _engines(client: EngineClient) -> dict[str, object]:
    """Return the state of each engine, if there are several."""
    if len(client.engines) == 1:
        return {}
    return {"engines": [{"number": engine.number, "status": engine.liveness.status} for engine in client.engines]}
