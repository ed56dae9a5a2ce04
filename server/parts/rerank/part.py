"""`/v1/rerank`, as Jina's and Cohere's clients call it, and `/v1/score`, vLLM's.

There are two ways to score a query and a document: the similarity of their embeddings, or a reranker's true or false.
"""

import math
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import mul
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field

from engine.shared.messages import SamplingParams, TokenEvent
from server.context import get_context
from server.dialect import Dialect, ModelRoute, Operation
from server.generation import prompts
from server.generation.preamble import Preamble, begin, find_model
from server.http.errors import BadRequestError, InvalidValueError, MissingParameterError, invalid
from server.models.served_model import ModelVariant, ServedModel
from server.part import Part
from server.parts.embeddings.part import PromptBatch, Prompts, PromptUsage, answer_prompts, embedding_params
from server.schemas.request_fields import QueueFields, optional
from server.settings.sampling import INT64_MAX
from server.text.templates.chat_encoding import encode_chat
from server.text.templates.sandbox import ChatTemplateError, TemplateLimitError
from server.text.tokenizer import Tokenizer

Pair = tuple[str, str]  # query, document

# The prompt on which Qwen3-Reranker was trained (its model card); other instruction-tuned models understand it too.
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{true}" or "{false}".'
)
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PAIR_ROLES = ('"document"', "'document'")  # in chat templates that take a query and a document as two messages


Scores = Callable[[Sequence[TokenEvent]], list[float]]  # those of pairs, by the last events of their prompts


def score_by_embeddings(model: ServedModel, pairs: Sequence[Pair], fields: tuple[str, str]) -> tuple[Prompts, Scores]:
    """Score pairs by the cosine similarity of the two texts' embeddings. Each distinct text is computed once.

    `fields` hold the queries and the documents, for errors.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))

    def encode() -> list[list[int]]:
        names: dict[str, str] = {}
        for pair, pair_names in zip(pairs, _names(pairs, fields), strict=True):
            names |= zip(pair, pair_names, strict=True)
        encoded = [prompts.encode_prompt(model, text, noun=names[text], limit=model.max_model_len) for text in texts]
        for text, prompt in zip(texts, encoded, strict=True):
            prompts.fit_max_tokens(0, len(prompt.token_ids), model.max_model_len, names[text])
        return [prompt.token_ids for prompt in encoded]

    def scores(events: Sequence[TokenEvent]) -> list[float]:
        embeddings = {text: event.embedding or [] for text, event in zip(texts, events, strict=True)}
        return [sum(map(mul, embeddings[query], embeddings[document])) for query, document in pairs]

    return Prompts(encode, len(texts), embedding_params(model), id_prefix="score", param=fields[1]), scores


def score_by_tokens(
    model: ServedModel, pairs: Sequence[Pair], fields: tuple[str, str], instruction: str
) -> tuple[Prompts, Scores]:
    """Score pairs by the probability that a reranker answers with the token for true rather than that for false."""

    def encode() -> list[list[int]]:
        named = zip(pairs, _names(pairs, fields), strict=True)
        return [_encode_pair(model, *pair, instruction, names) for pair, names in named]

    def score(event: TokenEvent) -> float:
        assert event.logprobs is not None
        (position,) = event.logprobs
        logprobs = dict(zip(position.top_token_ids, position.top_logprobs, strict=True))
        true, false = (logprobs[token_id] for token_id in model.score_token_ids)
        return 1 / (1 + math.exp(min(false - true, 700.0)))

    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, logprob_token_ids=model.score_token_ids)
    asked = Prompts(encode, len(pairs), params, id_prefix="score", param=fields[1])
    return asked, lambda events: list(map(score, events))


def find_score_tokens(tokenizer: Tokenizer, words: str, num_token_ids: int) -> tuple[int, ...]:
    """Return the tokens of `--score-tokens TRUE,FALSE`.

    Raises ValueError unless each of the two words is one token, which is among the model's `num_token_ids`.
    """
    found = [tokenizer.encode(word, add_special_tokens=False) for word in words.split(",")]
    if any(len(token_ids) != 1 or token_ids[0] >= num_token_ids for token_ids in found):
        raise ValueError(f"--score-tokens {words}: expected two words that are one token each in this model")
    return tuple(token_id for (token_id,) in found)


def _encode_pair(model: ServedModel, query: str, document: str, instruction: str, names: tuple[str, str]) -> list[int]:
    """Return the prompt that asks a reranker about a pair. Raises BadRequestError, with one of its `names`."""
    template, max_model_len = model.chat_template, model.max_model_len
    longer = names[len(document) >= len(query)]
    if template is None:
        raise BadRequestError("This model has no chat template, which --score-tokens needs.", param="model")
    prompts.check_text_size(len(query.encode()) + len(document.encode()), max_model_len, longer)
    if any(role in template.source for role in PAIR_ROLES):
        messages = [
            {"role": "system", "content": instruction},
            {"role": "query", "content": query},
            {"role": "document", "content": document},
        ]
    else:
        true, false = (model.settings.score_tokens or "").split(",")
        text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        messages = [
            {"role": "system", "content": SYSTEM.format(true=true, false=false)},
            {"role": "user", "content": text},
        ]
    options = {"enable_thinking": False} if "enable_thinking" in template.options else {}
    check = partial(prompts.check_min_tokens, model, limit=max_model_len, noun=longer)
    try:
        token_ids = encode_chat(template, model.tokenizer, messages, template_kwargs=options, check_prompt=check)
    except (ChatTemplateError, TemplateLimitError) as error:
        raise InvalidValueError(str(error), param=names[1]) from error
    prompts.check_token_range(model, token_ids, longer)
    prompts.fit_max_tokens(1, len(token_ids), max_model_len, longer)
    return token_ids


def _names(pairs: Sequence[Pair], fields: tuple[str, str]) -> list[tuple[str, str]]:
    """Return how errors name the texts of each pair: by the field, with an index if its texts differ."""
    has_index = [len(set(texts)) > 1 for texts in zip(*pairs, strict=True)]
    query, document = (f"{field}[{{}}]" if each else field for field, each in zip(fields, has_index, strict=True))
    return [(query.format(index), document.format(index)) for index in range(len(pairs))]


MAX_TEXTS = 2048  # the limit of inputs for embeddings


def _plain_texts(value: object) -> object:
    """Return the texts of documents, each a string or an object with `text`, as Cohere's clients send them.

    A single document need not be in a list.
    """
    if not isinstance(value, list):
        return _as_list(value)
    return [item["text"] if isinstance(item, dict) and item.keys() == {"text"} else item for item in value]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
Documents = Annotated[Texts, BeforeValidator(_plain_texts, json_schema_input_type=str | Texts)]
TextOrTexts = Annotated[Texts, BeforeValidator(_as_list, json_schema_input_type=str | Texts)]


class ScoringRequest(QueueFields):
    """The parameters of both endpoints."""

    model: str = Field(description="Name of the model, as listed by GET /v1/models.")
    instruction: str | None = optional(
        "With --score-tokens: the task, for models that read one. Default: that of a web search."
    )


class RerankRequest(ScoringRequest):
    query: str = Field(description="The text to compare the documents with.")
    documents: Documents = Field(description="One or more documents: strings, or objects with `text`.")
    top_n: int | None = Field(None, ge=1, le=INT64_MAX, description="Number of results. Default: all documents.")
    return_documents: bool | None = optional("Return the text of each document. Default true.")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, le=INT64_MAX, description="Compare only this many first tokens of each document. Default: all."
    )


class ScoreRequest(ScoringRequest):
    text_1: TextOrTexts | None = optional("One text, or as many as text_2 has. Required.")
    text_2: TextOrTexts | None = optional("One or more texts, each compared with its counterpart in text_1. Required.")
    queries: TextOrTexts | None = optional("Alias of text_1.")
    documents: TextOrTexts | None = optional("Alias of text_2.")

    def pairs(self) -> tuple[list[tuple[str, str]], tuple[str, str]]:
        """Return the pairs to score, and the names of the fields that hold them. Raises BadRequestError."""
        first, second = self._sent("text_1", "queries"), self._sent("text_2", "documents")
        firsts, seconds = getattr(self, first), getattr(self, second)
        if len(firsts) not in (1, len(seconds)):
            message = (
                f"Invalid '{first}': expected one text or {len(seconds)}, as many as '{second}' has, "
                f"but got {len(firsts)}."
            )
            raise InvalidValueError(message, param=first)
        return list(zip(firsts if len(firsts) > 1 else firsts * len(seconds), seconds, strict=True)), (first, second)

    def _sent(self, name: str, alias: str) -> str:
        """Return which of two names of a field the client sent."""
        sent = [each for each in (name, alias) if getattr(self, each) is not None]
        if not sent:
            raise MissingParameterError(name)
        if len(sent) > 1:
            raise invalid(alias, f"it is an alias of '{name}', so only one is allowed")
        return sent[0]


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    index: int  # of the document in the request
    relevance_score: float
    document: dict[str, Any] | UnsetType = UNSET


class RerankAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    results: list[RerankResult]  # best first
    usage: PromptUsage


class Score(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int  # Unix time in seconds
    model: str
    data: list[Score]
    usage: PromptUsage


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

    def answer(scores: list[float], usage: PromptUsage) -> RerankAnswer:
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

    def answer(scores: list[float], usage: PromptUsage) -> ScoreList:
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
    answer: Callable[[list[float], PromptUsage], msgspec.Struct],
    preamble: Preamble,
) -> Response:
    """Answer with what `answer` makes of the score of each pair. `fields` hold the texts, for errors.

    Raises APIError.
    """
    if model.base.score_token_ids:
        asked, scores = score_by_tokens(model.base, pairs, fields, body.instruction or DEFAULT_INSTRUCTION)
    else:
        asked, scores = score_by_embeddings(model.base, pairs, fields)

    def write(batch: PromptBatch) -> bytes:
        usage = PromptUsage(batch.num_tokens, batch.num_tokens)
        return msgspec.json.encode(answer(scores(batch.events), usage))

    return await answer_prompts(request, model, body, asked, write, preamble)


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
