"""`GET /v1/models`: OpenAI's fields, and vLLM's `root`, `parent` and `max_model_len`; or Anthropic's fields."""

from typing import Literal

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int  # seconds since the epoch
    owned_by: str = "lightwell"
    root: str  # of a LoRA adapter its path
    parent: str | None = None  # of a LoRA adapter the model
    max_model_len: int  # tokens


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class AnthropicModel(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="model"):
    id: str
    display_name: str
    created_at: str  # RFC 3339
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int


class AnthropicModelList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[AnthropicModel]
    has_more: Literal[False] = False
    first_id: str
    last_id: str
