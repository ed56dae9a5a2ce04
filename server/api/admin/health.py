"""Health endpoints for load balancers and orchestrators. They answer from memory, in any state, without an API key.

`/health` and `/readyz` report whether to send requests to this server; `/healthz` whether to keep the process alive.
Of several models, one that is loaded, or that the next request loads, is enough; while none is, `/healthz` still
answers 200, since a request can load one again. `/readyz` waits for those that are loaded at the start.
"""

from collections import Counter

import msgspec
from fastapi import APIRouter, Request, Response

from server.context import ServerContext, get_context
from server.engine_client.client import EngineClient
from server.http.errors import EngineUnavailableError
from server.http.json_response import StructResponse
from server.parts.models.manager import ModelManager

router = APIRouter()

SHUTTING_DOWN = "The server is shutting down."
NO_PROGRESS = "The work on texts makes no progress."


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Return 200 while the engine's step loop and the work on texts make progress. The path is vLLM's."""
    context = get_context(request)
    if (manager := context.model_manager) is not None:
        return _models_answer(context, NO_PROGRESS if context.text_threads.is_stuck else _no_model(manager, context))
    return _answer(context, is_ok=_makes_progress(context))


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive(request: Request) -> Response:
    """Return 200 while the model loads, or the engine runs or is being restarted; 503 once it is dead or hangs."""
    context = get_context(request)
    if context.model_manager is not None:
        return _models_answer(context, None)
    return _answer(context, is_ok=context.models.default.client.is_alive)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Return 200 while new requests are admitted."""
    context = get_context(request)
    if (manager := context.model_manager) is not None:
        problem = _no_model(manager, context) if manager.has_started.is_set() else "The models are still being loaded."
        return _models_answer(context, SHUTTING_DOWN if manager.is_draining else problem)
    is_draining = context.models.default.client.drain_requested.is_set()
    return _answer(context, is_ok=_makes_progress(context) and not is_draining)


def _makes_progress(context: ServerContext) -> bool:
    return context.models.default.client.is_healthy and not context.text_threads.is_stuck


def _no_model(manager: ModelManager, context: ServerContext) -> str | None:
    """Return the problem that no model can be used at this time, or None."""
    return None if any(map(manager.is_usable, context.models.slots)) else "No model can be loaded."


def _models_answer(context: ServerContext, problem: str | None) -> Response:
    """Return 200 with the number of models in each state, unless there is a problem."""
    if problem is not None:
        return EngineUnavailableError(problem).response()
    states = Counter(slot.state for slot in context.models.slots)
    restarts = sum(model.client.num_restarts for model in context.models.loaded)
    return StructResponse({"status": "ok", "restarts": restarts, "models": states})


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
        return EngineUnavailableError(SHUTTING_DOWN).response()
    if client.is_healthy:
        return EngineUnavailableError(NO_PROGRESS).response()
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
