"""`POST /v1/embeddings`."""

from fastapi import APIRouter, Request, Response

from server.api.embeddings.pipeline import embed, validate
from server.api.embeddings.schemas import EmbeddingRequest
from server.api.embeddings.writer import write_answer
from server.context import get_context
from server.http.json_route import StrictJSONRoute
from server.http.sse import run_until_disconnect

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/embeddings")
async def create_embedding(request: Request, body: EmbeddingRequest) -> Response:
    """Return the embeddings of one or more texts."""
    model, headers = validate(request, body)
    embeddings = await run_until_disconnect(request, embed(request, body, model))
    content = await get_context(request).run_text_work(request, write_answer, body, embeddings)
    return Response(content, headers=headers, media_type="application/json")
