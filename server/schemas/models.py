"""`GET /v1/models`: OpenAI's fields, and vLLM's `root`, `parent` and `max_model_len`."""

from typing import Literal

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int  # seconds since the epoch
    owned_by: str = "lightwell"
    root: str
    parent: None = None
    max_model_len: int  # tokens


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]
