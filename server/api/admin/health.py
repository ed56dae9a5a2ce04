"""Whether the server works, for those who watch it. Answered from memory, without a key, in any state.

`/health` and `/readyz` say whether to send requests here; `/healthz` whether to let the process live.
"""

from fastapi import APIRouter, Request, Response

from server.context import get_context
from server.engine_client.client import EngineClient
from server.http.errors import EngineUnavailableError
from server.http.json_response import StructResponse

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine's step loop moves. What load balancers made for vLLM ask for."""
    client = get_context(request).client
    return _answer(client, is_well=client.is_healthy)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive(request: Request) -> Response:
    """200 also while the model is loaded; 503 once the engine is dead or hangs."""
    client = get_context(request).client
    return _answer(client, is_well=client.is_alive)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """200 while new requests are taken."""
    client = get_context(request).client
    return _answer(client, is_well=client.is_healthy and not client.draining)


def _answer(client: EngineClient, *, is_well: bool) -> Response:
    if is_well:
        return StructResponse({"status": "ok"})
    if client.dead_reason is not None:
        return EngineUnavailableError("The engine has stopped.").response()
    if not client.is_ready:
        return EngineUnavailableError("The model is still being loaded.").response()
    if client.draining:
        return EngineUnavailableError("The server is shutting down.").response()
    return EngineUnavailableError("The engine does not respond.").response()
