"""Two ways to score a query and a document: the similarity of their embeddings, or a reranker's true or false."""

import math
from collections.abc import Sequence
from functools import partial
from operator import mul
from typing import Protocol

from engine.shared.messages import SamplingParams, TokenEvent
from server.generation.prompts import (
    check_min_tokens,
    check_text_size,
    check_token_range,
    encode_prompt,
    fit_max_tokens,
)
from server.http.errors import BadRequestError, InvalidValueError
from server.models.served_model import ModelVariant
from server.parts.embeddings.pipeline import embedding_params
from server.text.templates.chat_encoding import encode_chat
from server.text.templates.sandbox import ChatTemplateError, TemplateLimitError

Pair = tuple[str, str]  # query, document

# The prompt on which Qwen3-Reranker was trained (its model card); other instruction-tuned models understand it too.
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{true}" or "{false}".'
)
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PAIR_ROLES = ('"document"', "'document'")  # in chat templates that take a query and a document as two messages


class Scorer(Protocol):
    """Makes the prompts for pairs of a query and a document, and scores from their last events."""

    params: SamplingParams  # of the prompts

    def num_prompts(self, pairs: Sequence[Pair]) -> int: ...

    def prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Return the token ids of the prompts to run. May be slow; called in a thread. Raises BadRequestError."""
        ...

    def scores(self, pairs: Sequence[Pair], events: Sequence[TokenEvent]) -> list[float]:
        """Return the score of each pair. `events` are those of the prompts. May be slow; called in a thread."""
        ...


def choose_scorer(model: ModelVariant, instruction: str | None, fields: tuple[str, str]) -> Scorer:
    """Return the scorer that --score-tokens selects. `fields` hold the queries and the documents, for errors."""
    if model.base.score_token_ids:
        return TokenScorer(model, instruction or DEFAULT_INSTRUCTION, fields)
    return EmbeddingScorer(model, fields)


class EmbeddingScorer:
    """Scores by the cosine similarity of the two texts' embeddings. Each distinct text is computed once."""

    def __init__(self, model: ModelVariant, fields: tuple[str, str]) -> None:
        self.params = embedding_params(model.base)
        self._model = model
        self._fields = fields

    def num_prompts(self, pairs: Sequence[Pair]) -> int:
        return len(_texts(pairs))

    def prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        names: dict[str, str] = {}
        for pair, pair_names in zip(pairs, _names(pairs, self._fields), strict=True):
            names |= zip(pair, pair_names, strict=True)
        return [self._prompt(text, names[text]) for text in _texts(pairs)]

    def _prompt(self, text: str, field: str) -> list[int]:
        token_ids = encode_prompt(self._model.base, text, noun=field, limit=self._model.base.max_model_len).token_ids
        fit_max_tokens(0, len(token_ids), self._model.base.max_model_len, field)
        return token_ids

    def scores(self, pairs: Sequence[Pair], events: Sequence[TokenEvent]) -> list[float]:
        embeddings = {text: event.embedding or [] for text, event in zip(_texts(pairs), events, strict=True)}
        return [sum(map(mul, embeddings[query], embeddings[document])) for query, document in pairs]


class TokenScorer:
    """Scores by the probability that a reranker answers with the token for true rather than that for false."""

    def __init__(self, model: ModelVariant, instruction: str, fields: tuple[str, str]) -> None:
        self.params = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=2, logprob_token_ids=model.base.score_token_ids
        )
        self._model = model
        self._fields = fields
        self._instruction = instruction

    def num_prompts(self, pairs: Sequence[Pair]) -> int:
        return len(pairs)

    def prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        return [self._prompt(*pair, names) for pair, names in zip(pairs, _names(pairs, self._fields), strict=True)]

    def scores(self, pairs: Sequence[Pair], events: Sequence[TokenEvent]) -> list[float]:
        return [self._score(event) for event in events]

    def _score(self, event: TokenEvent) -> float:
        assert event.logprobs is not None
        (position,) = event.logprobs
        logprobs = dict(zip(position.top_token_ids, position.top_logprobs, strict=True))
        true, false = (logprobs[token_id] for token_id in self._model.base.score_token_ids)
        return 1 / (1 + math.exp(min(false - true, 700.0)))

    def _prompt(self, query: str, document: str, names: tuple[str, str]) -> list[int]:
        template, max_model_len = self._model.base.chat_template, self._model.base.max_model_len
        longer = names[len(document) >= len(query)]
        if template is None:
            raise BadRequestError("This model has no chat template, which --score-tokens needs.", param="model")
        check_text_size(len(query.encode()) + len(document.encode()), max_model_len, longer)
        if any(role in template.source for role in PAIR_ROLES):
            messages = [
                {"role": "system", "content": self._instruction},
                {"role": "query", "content": query},
                {"role": "document", "content": document},
            ]
        else:
            true, false = (self._model.base.settings.score_tokens or "").split(",")
            text = f"<Instruct>: {self._instruction}\n<Query>: {query}\n<Document>: {document}"
            messages = [
                {"role": "system", "content": SYSTEM.format(true=true, false=false)},
                {"role": "user", "content": text},
            ]
        options = {"enable_thinking": False} if "enable_thinking" in template.options else {}
        check = partial(check_min_tokens, self._model.base, limit=max_model_len, noun=longer)
        try:
            token_ids = encode_chat(
                template, self._model.base.tokenizer, messages, template_kwargs=options, check_prompt=check
            )
        except (ChatTemplateError, TemplateLimitError) as error:
            raise InvalidValueError(str(error), param=names[1]) from error
        check_token_range(self._model.base, token_ids, longer)
        fit_max_tokens(1, len(token_ids), max_model_len, longer)
        return token_ids


def _names(pairs: Sequence[Pair], fields: tuple[str, str]) -> list[tuple[str, str]]:
    """Return how errors name the texts of each pair: by the field, with an index if its texts differ."""
    has_index = [len(set(texts)) > 1 for texts in zip(*pairs, strict=True)]
    query, document = (f"{field}[{{}}]" if each else field for field, each in zip(fields, has_index, strict=True))
    return [(query.format(index), document.format(index)) for index in range(len(pairs))]


def _texts(pairs: Sequence[Pair]) -> list[str]:
    """Return the distinct texts of pairs, in order."""
    return list(dict.fromkeys(text for pair in pairs for text in pair))
