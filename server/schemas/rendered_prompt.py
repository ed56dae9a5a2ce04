"""The answer of `.../render`, an endpoint of vLLM: a request as the model would see it."""

from typing import Any

import msgspec


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One rendered prompt of a request."""

    request_id: str
    model: str
    prompt: str  # the token ids as text, including special tokens
    token_ids: list[int]
    max_tokens: int  # per choice
    sampling_params: dict[str, Any]  # as sent to the engine; the seed is null unless the request sets it
