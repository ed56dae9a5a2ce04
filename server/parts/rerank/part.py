"""Scores of texts, as Cohere's, Jina's and vLLM's APIs have them."""

from server.dialect import Dialect, Operation
from server.part import Part
from server.parts.rerank.routes import router
from server.parts.rerank.schemas import RerankAnswer, ScoreList

QUERY, TEXTS = "capital of France", ["Paris", "Rome"]

RERANK = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={
        ("/v1/rerank", "post"): Operation(RerankAnswer, {"query": QUERY, "documents": TEXTS}, reaches_engine=True),
        ("/v1/score", "post"): Operation(ScoreList, {"text_1": QUERY, "text_2": TEXTS}, reaches_engine=True),
    },
    in_workers=True,
)

PART = Part(dialects=[RERANK])
