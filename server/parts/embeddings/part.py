"""OpenAI's embeddings: `POST /v1/embeddings`."""

from functools import partial

from fastapi import APIRouter, Request, Response

from server.api.model_route import ModelRoute
from server.dialect import BEGINNING, Dialect, Operation
from server.part import Part
from server.parts.embeddings.pipeline import respond, write_answer
from server.parts.embeddings.schemas import EmbeddingList, EmbeddingRequest

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/embeddings")
async def create_embedding(request: Request, body: EmbeddingRequest) -> Response:
    """Return the embeddings of one or more texts."""
    return await respond(request, body, partial(write_answer, body))


EMBEDDINGS = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={("/v1/embeddings", "post"): Operation(EmbeddingList, {"input": BEGINNING}, reaches_engine=True)},
    in_workers=True,
)

PART = Part(dialects=[EMBEDDINGS])
