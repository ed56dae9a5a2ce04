"""OpenAI's embeddings."""

from server.api.dialect import BEGINNING, Dialect, Operation
from server.api.embeddings.routes import router
from server.api.embeddings.schemas import EmbeddingList

EMBEDDINGS = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={("/v1/embeddings", "post"): Operation(EmbeddingList, {"input": BEGINNING}, reaches_engine=True)},
    in_workers=True,
)
