"""`POST /v1/embeddings`."""

from fastapi import APIRouter, Request, Response

from server.api.embeddings.pipeline import embed, judge
from server.api.embeddings.schemas import EmbeddingRequest
from server.context import get_context
from server.http.middleware import StrictJSONRoute
from server.http.sse import run_until_disconnect

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/embeddings")
async def create_embedding(request: Request, body: EmbeddingRequest) -> Response:
    """What the model makes of one or several texts, as vectors."""
    model, headers = judge(get_context(request), body)
    content = await run_until_disconnect(request, embed(request, body, model))
    return Response(content, headers=headers, media_type="application/json")
