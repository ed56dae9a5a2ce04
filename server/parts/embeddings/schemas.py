"""`POST /v1/embeddings`: the request and the answer."""

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, PlainValidator, WithJsonSchema

from server.api.completions.schemas import PromptInput, prompts_schema, read_prompts
from server.schemas.answers import RequestTimings
from server.schemas.request_fields import LightwellOptions, QueueFields, TruncatedLength, TruncationSide

MAX_INPUTS = 2048  # OpenAI's limit

Inputs = Annotated[
    list[PromptInput],
    PlainValidator(partial(read_prompts, max_prompts=MAX_INPUTS)),
    WithJsonSchema(prompts_schema(MAX_INPUTS)),
]


class EmbeddingRequest(QueueFields):
    model: str = Field(description="Name of the model, as listed by GET /v1/models.")
    input: Inputs = Field(description="One or more inputs, as text or token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float: a list of numbers. base64: their encoding as little-endian float32. Default float."
    )
    add_special_tokens: bool | None = Field(
        None, description="Add the special tokens that the model expects around a text. Default true."
    )
    truncate_prompt_tokens: TruncatedLength | None = Field(
        None, description="Truncate each input to this many tokens; -1: to the maximum model length. Default: never."
    )
    truncation_side: TruncationSide | None = Field(
        None, description="Side from which truncate_prompt_tokens removes tokens. Default left: the beginning."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Number of dimensions to keep; the result is rescaled to length 1. Default: all."
    )
    lightwell: LightwellOptions | None = Field(None, description="Options specific to this server.")

    @property
    def explain(self) -> bool:
        """True if the answer should include the request's timings."""
        return self.lightwell is not None and bool(self.lightwell.explain)


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """An embedding of length 1 (L2 norm)."""

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
    lightwell: RequestTimings | UnsetType = UNSET
