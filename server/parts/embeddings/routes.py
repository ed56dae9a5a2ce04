"""`POST /v1/embeddings`."""

from functools import partial

from fastapi import APIRouter, Request, Response

from server.api.model_route import ModelRoute
from server.parts.embeddings.pipeline import respond
from server.parts.embeddings.schemas import EmbeddingRequest
from server.parts.embeddings.writer import write_answer

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/embeddings")
async def create_embedding(request: Request, body: EmbeddingRequest) -> Response:
    """Return the embeddings of one or more texts."""
    return await respond(request, body, partial(write_answer, body))
