"""`POST /v1/rerank` and `POST /v1/score`, as Cohere's, Jina's and vLLM's APIs have them, also under their paths."""

import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server.api.model_route import ModelRoute
from server.context import get_context
from server.dialect import Dialect, Operation
from server.generation.preamble import Preamble, begin, find_model
from server.models.served_model import ModelVariant
from server.part import Part
from server.parts.embeddings.pipeline import PromptBatch, Prompts, answer_prompts
from server.parts.rerank.schemas import (
    RerankAnswer,
    RerankRequest,
    RerankResult,
    Score,
    ScoreList,
    ScoreRequest,
    ScoringRequest,
    ScoringUsage,
)
from server.parts.rerank.scorers import Pair, choose_scorer
from server.text.tokenizer import Tokenizer

router = APIRouter(route_class=ModelRoute)


@router.post("/v2/rerank", include_in_schema=False)
@router.post("/rerank", include_in_schema=False)
@router.post("/v1/rerank")
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Return documents by their relevance to a query, best first."""
    context = get_context(request)
    model, preamble = _begin(request, body)
    tokenizer, num_tokens = model.base.tokenizer, body.max_tokens_per_doc
    documents = await context.run_text_work(request, _shorten, tokenizer, body.documents, num_tokens)
    pairs = [(body.query, document) for document in documents]

    def answer(scores: list[float], usage: ScoringUsage) -> RerankAnswer:
        results = [
            RerankResult(
                index=index,
                relevance_score=scores[index],
                document=UNSET if body.return_documents is False else {"text": body.documents[index]},
            )
            for index in sorted(range(len(pairs)), key=lambda index: -scores[index])[: body.top_n]
        ]
        return RerankAnswer(id=_new_id("rerank"), model=model.name, results=results, usage=usage)

    return await _score(request, body, model, pairs, ("query", "documents"), answer, preamble)


@router.post("/score", include_in_schema=False)
@router.post("/v1/score")
async def score(request: Request, body: ScoreRequest) -> Response:
    """Return the score of each pair of texts."""
    pairs, fields = body.pairs()
    model, preamble = _begin(request, body)

    def answer(scores: list[float], usage: ScoringUsage) -> ScoreList:
        data = [Score(index=index, score=value) for index, value in enumerate(scores)]
        return ScoreList(id=_new_id("score"), created=int(time.time()), model=model.name, data=data, usage=usage)

    return await _score(request, body, model, pairs, fields, answer, preamble)


def _begin(request: Request, body: ScoringRequest) -> tuple[ModelVariant, Preamble]:
    """Return the model to use, and the result of the first checks.

    Raises BadRequestError, ModelNotFoundError or EngineUnavailableError.
    """
    model = find_model(request, body.model)
    model.base.client.ready_info()
    unread = body.instruction is not None and not model.base.score_token_ids
    return model, begin(request, body, ignored=["instruction"] if unread else [])


async def _score(
    request: Request,
    body: ScoringRequest,
    model: ModelVariant,
    pairs: Sequence[Pair],
    fields: tuple[str, str],
    answer: Callable[[list[float], ScoringUsage], msgspec.Struct],
    preamble: Preamble,
) -> Response:
    """Answer with what `answer` makes of the score of each pair. `fields` hold the texts, for errors.

    Raises APIError.
    """
    scorer = choose_scorer(model, body.instruction, fields)

    def write(batch: PromptBatch) -> bytes:
        usage = ScoringUsage(batch.num_tokens, batch.num_tokens)
        return msgspec.json.encode(answer(scorer.scores(pairs, batch.events), usage))

    prompts = Prompts(
        encode=partial(scorer.prompts, pairs),
        count=scorer.num_prompts(pairs),
        params=scorer.params,
        id_prefix="score",
        param=fields[1],
    )
    return await answer_prompts(request, model, body, prompts, write, preamble)


def _new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"


def _shorten(tokenizer: Tokenizer, documents: list[str], num_tokens: int | None) -> list[str]:
    """Return the first `num_tokens` tokens of each document as text."""
    if num_tokens is None:
        return documents
    encoded = [tokenizer.encode(document, add_special_tokens=False, parse_special=False) for document in documents]
    return [
        document if len(token_ids) <= num_tokens else tokenizer.decode(token_ids[:num_tokens])
        for document, token_ids in zip(documents, encoded, strict=True)
    ]


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
