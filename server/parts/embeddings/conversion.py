"""Converts a request for embeddings to prompts, and each prompt to a `Submit` that generates no tokens."""

from typing import Any

from engine.shared.messages import Pooling, SamplingParams, Submit
from server.generation.prompts import encode_prompt, fit_max_tokens, truncate_prompt
from server.models.served_model import ModelVariant, ServedModel
from server.parts.embeddings.schemas import EmbeddingRequest


def encode_inputs(model: ServedModel, body: EmbeddingRequest) -> list[list[int]]:
    """Return the token ids of each input. Raises BadRequestError."""
    num_tokens = body.truncate_prompt_tokens
    options: Any = {
        "add_special_tokens": body.add_special_tokens is not False,
        "limit": model.max_model_len if num_tokens is None else None,
    }
    prompts = [encode_prompt(model, value, noun="input", **options) for value in body.input]
    if num_tokens is not None:
        num_tokens = model.max_model_len if num_tokens == -1 else num_tokens
        prompts = [truncate_prompt(prompt, num_tokens, body.truncation_side or "left") for prompt in prompts]
    for prompt in prompts:
        fit_max_tokens(0, len(prompt.token_ids), model.max_model_len, "input")
    return [prompt.token_ids for prompt in prompts]


def make_submit(
    model: ModelVariant, request_id: str, token_ids: list[int], arrival: float, *, priority: int = 0
) -> Submit:
    """Return the engine message that asks for the embedding of a prompt."""
    params = SamplingParams(max_tokens=0, temperature=0.0, pooling=Pooling(model.base.settings.pooling))
    return Submit(
        request_id=request_id,
        prompt_token_ids=token_ids,
        params=params,
        arrival=arrival,
        priority=priority,
        lora_name=model.lora_name,
        lora_fingerprint=model.lora_fingerprint,
    )
