"""Writes the answer to a request for embeddings."""

import base64
import math
import struct

import msgspec

from server.parts.embeddings.pipeline import Embeddings
from server.parts.embeddings.schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage


def write_answer(body: EmbeddingRequest, embeddings: Embeddings) -> bytes:
    """Return the answer as JSON."""
    data = [
        Embedding(embedding=_format(shorten(vector, body.dimensions), body.encoding_format), index=index)
        for index, vector in enumerate(embeddings.vectors)
    ]
    usage = EmbeddingUsage(embeddings.num_tokens, embeddings.num_tokens)
    answer = msgspec.json.encode(EmbeddingList(data=data, model=body.model, usage=usage))
    if not body.explain:
        return answer
    return answer[:-1] + b',"lightwell":' + msgspec.json.encode(embeddings.timings()) + b"}"


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
