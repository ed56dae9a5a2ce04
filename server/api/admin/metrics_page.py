"""`GET /metrics` in the Prometheus text format."""

from fastapi import APIRouter, Request, Response

from server.context import get_context

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    page, content_type = get_context(request).metrics.exposition()
    return Response(page, headers={"content-type": content_type})
