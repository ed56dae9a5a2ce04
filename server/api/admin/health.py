"""Health endpoints for load balancers and orchestrators. They answer from memory, in any state, without an API key.

`/health` and `/readyz` report whether to send requests to this server; `/healthz` whether to keep the process alive.
"""

from fastapi import APIRouter, Request, Response

from server.context import get_context

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Return 200 while the engine's step loop and the work on texts make progress. The path is vLLM's."""
    context = get_context(request)
    return context.source.health(is_stuck=context.text_threads.is_stuck)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive(request: Request) -> Response:
    """Return 200 while the model loads, or the engine runs or is being restarted; 503 once it is dead or hangs."""
    return get_context(request).source.alive()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Return 200 while new requests are admitted."""
    context = get_context(request)
    return context.source.ready(is_stuck=context.text_threads.is_stuck)
