"""`POST /v1/embeddings`: its request and its answer."""

from typing import Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from server.schemas.completions import Prompts


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="Name of the model, one of GET /v1/models.")
    input: Prompts = Field(description="One text or several, each as text or as token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers, or base64 of their 32-bit floats, lowest byte first. Default float."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Only so many of the numbers, scaled to length 1 again. Default: as the model has."
    )


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """Of length 1 (L2)."""

    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str
    index: int  # of the input


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
