"""OpenAI's embeddings."""

from server.dialect import BEGINNING, Dialect, Operation
from server.part import Part
from server.parts.embeddings.routes import router
from server.parts.embeddings.schemas import EmbeddingList

EMBEDDINGS = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={("/v1/embeddings", "post"): Operation(EmbeddingList, {"input": BEGINNING}, reaches_engine=True)},
    in_workers=True,
)

PART = Part(dialects=[EMBEDDINGS])
