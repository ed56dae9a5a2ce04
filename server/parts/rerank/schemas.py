"""`/v1/rerank`, as Jina's and Cohere's clients call it, and `/v1/score`, vLLM's: the requests and the answers."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field

from server.http.errors import InvalidValueError, MissingParameterError
from server.schemas.request_fields import QueueFields
from server.settings.sampling import INT64_MAX

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
    instruction: str | None = Field(
        None, description="With --score-tokens: the task, for models that read one. Default: that of a web search."
    )


class RerankRequest(ScoringRequest):
    query: str = Field(description="The text to compare the documents with.")
    documents: Documents = Field(description="One or more documents: strings, or objects with `text`.")
    top_n: int | None = Field(None, ge=1, le=INT64_MAX, description="Number of results. Default: all documents.")
    return_documents: bool | None = Field(None, description="Return the text of each document. Default true.")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, le=INT64_MAX, description="Compare only this many first tokens of each document. Default: all."
    )


class ScoreRequest(ScoringRequest):
    text_1: TextOrTexts | None = Field(None, description="One text, or as many as text_2 has. Required.")
    text_2: TextOrTexts | None = Field(
        None, description="One or more texts, each compared with its counterpart in text_1. Required."
    )
    queries: TextOrTexts | None = Field(None, description="Alias of text_1.")
    documents: TextOrTexts | None = Field(None, description="Alias of text_2.")

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
            raise InvalidValueError(
                f"Invalid '{alias}': it is an alias of '{name}', so only one is allowed.", param=alias
            )
        return sent[0]


class ScoringUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    index: int  # of the document in the request
    relevance_score: float
    document: dict[str, Any] | UnsetType = UNSET


class RerankAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    results: list[RerankResult]  # best first
    usage: ScoringUsage


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
    usage: ScoringUsage
