"""`.../render`, which is vLLM's: what a request becomes before the model sees it."""

from typing import Any

import msgspec


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request."""

    request_id: str
    model: str
    prompt: str  # the token ids as text, control tokens included
    token_ids: list[int]
    max_tokens: int  # of each choice
    sampling_params: dict[str, Any]  # as the engine would get them; the seed is null if the request brings none
