"""`POST /v1/embeddings`: its request and its answer."""

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from server.api.completions.schemas import PromptInput, prompts_schema, read_prompts
from server.schemas.common import INT64_MIN, Account, LightwellOptions, TruncatedLength, TruncationSide
from server.schemas.samplers import INT64_MAX

MAX_INPUTS = 2048  # OpenAI's limit

Inputs = Annotated[
    list[PromptInput],
    PlainValidator(partial(read_prompts, max_prompts=MAX_INPUTS)),
    WithJsonSchema(prompts_schema(MAX_INPUTS)),
]


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="Name of the model, one of GET /v1/models.")
    input: Inputs = Field(description="One text or several, each as text or as token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers, or base64 of their 32-bit floats, lowest byte first. Default float."
    )
    add_special_tokens: bool | None = Field(
        None, description="Put around a text the special tokens that the model wants there. Default true."
    )
    truncate_prompt_tokens: TruncatedLength | None = Field(
        None, description="Cut each input to this many tokens; -1: to what the model can take. Default: never."
    )
    truncation_side: TruncationSide | None = Field(
        None, description="Which end of an input truncate_prompt_tokens cuts off. Default left: the beginning."
    )
    priority: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX, description="Lower runs first. Default 0.")
    dimensions: int | None = Field(
        None, ge=1, description="Only so many of the numbers, scaled to length 1 again. Default: as the model has."
    )
    lightwell: LightwellOptions | None = Field(None, description="What only this server can tell.")

    @property
    def explain(self) -> bool:
        """Whether an account of its time is wanted."""
        return self.lightwell is not None and bool(self.lightwell.explain)


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
    lightwell: Account | UnsetType = UNSET
