"""Writes the answer to a request for embeddings."""

import base64
import math
import struct
from collections.abc import Sequence

import msgspec

from server.api.embeddings.schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage


def write_answer(body: EmbeddingRequest, embeddings: Sequence[list[float]], num_tokens: int) -> bytes:
    """Return the answer as JSON. `num_tokens` is the total number of prompt tokens."""
    data = [
        Embedding(embedding=_format(shorten(embedding, body.dimensions), body.encoding_format), index=index)
        for index, embedding in enumerate(embeddings)
    ]
    return msgspec.json.encode(EmbeddingList(data=data, model=body.model, usage=EmbeddingUsage(num_tokens, num_tokens)))


def shorten(embedding: list[float], num_dimensions: int | None) -> list[float]:
    """Return the first `num_dimensions` numbers of an embedding, scaled to length 1 (L2)."""
    if num_dimensions is None or num_dimensions == len(embedding):
        return embedding
    first = embedding[:num_dimensions]
    norm = math.hypot(*first) or 1.0
    return [value / norm for value in first]


def _format(embedding: list[float], encoding_format: str | None) -> list[float] | str:
    if encoding_format != "base64":
        return embedding
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
