"""`GET /metrics` in the Prometheus text format."""

from fastapi import APIRouter, Request, Response

from server.context import get_context
from server.http.access_control import require_admin
from server.metrics import exposition

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus. With several API keys, an admin key is required."""
    if not get_context(request).settings.public_metrics:
        require_admin(request)
    page, content_type = exposition([slot.metrics for slot in get_context(request).models.slots])
    return Response(page, headers={"content-type": content_type})
