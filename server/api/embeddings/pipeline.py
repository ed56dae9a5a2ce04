"""From a request for embeddings to its answer: each input is a prompt of which the engine is asked for no token."""

import base64
import math
import secrets
import struct
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import msgspec
from fastapi import Request

from engine.shared.messages import FinishReason, Pooling, SamplingParams, Submit
from server.api.embeddings.schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from server.context import ServedModel, ServerContext, get_context
from server.engine_client.client import RequestStream, Reservation
from server.generation.parameters import unknown_parameters, warnings_header
from server.generation.prompts import encode_prompt, fit_max_tokens, truncated
from server.generation.timings import Ending, account_of
from server.http.errors import InvalidValueError, ServerError

NO_SEED = 0  # nothing is sampled


def judge(context: ServerContext, body: EmbeddingRequest) -> tuple[ServedModel, dict[str, str]]:
    """What to ask, and headers of the answer. Raises BadRequestError, ModelNotFoundError, EngineUnavailableError."""
    model = context.find_model(body.model)
    unknown = unknown_parameters(body, strict=context.settings.strict)
    size = context.model_config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = (
            f"Invalid 'dimensions': integer above maximum value. Expected a value <= {size}, "
            f"but got {body.dimensions} instead."
        )
        raise InvalidValueError(message, param="dimensions", code="integer_above_max_value")
    is_deterministic = context.client.ready_info().deterministic
    context.metrics.count_unknown_parameters(len(unknown))
    headers = {"x-lightwell-deterministic": "true" if is_deterministic else "false"}
    if unknown:
        headers["x-lightwell-warnings"] = warnings_header(unknown)
    return model, headers


async def embed(request: Request, body: EmbeddingRequest, model: ServedModel) -> bytes:
    """The answer as JSON. Raises APIError. Cancelled, it ends what runs in the engine."""
    context, arrival, name = get_context(request), time.monotonic(), f"embd-{secrets.token_hex(16)}"
    # As many at a time as the engine runs; the others need no slots yet.
    size = min(len(body.input), context.client.ready_info().max_num_seqs, context.client.max_in_flight)
    embeddings: list[list[float]] = []
    endings: list[Ending] = []
    with context.client.reserve(size, param="input") as reservation:
        prompts = await context.run_text_work(_encode, context, body)
        submitted = time.monotonic()
        submits = [_submit(context, body, model, f"{name}-{i}", prompt, arrival) for i, prompt in enumerate(prompts)]
        while len(embeddings) < len(submits):
            waiting = submits[len(embeddings) :]
            num_slots = reservation.count or await context.client.refill(reservation, min(size, len(waiting)))
            for embedding, ending in await _run(context, waiting[:num_slots], reservation, request.state.request_id):
                embeddings.append(embedding)
                endings.append(ending)
    answer = await context.run_text_work(_answer, body, embeddings, sum(map(len, prompts)))
    if not body.explain:
        return answer
    last = max(endings, key=_finished)
    account = account_of(last, arrival=arrival, submitted=submitted, seed=NO_SEED)
    return answer[:-1] + b',"lightwell":' + msgspec.json.encode(account) + b"}"


def _finished(ending: Ending) -> float:
    return (ending.times and ending.times.finished) or ending.received


def _submit(
    context: ServerContext,
    body: EmbeddingRequest,
    model: ServedModel,
    request_id: str,
    prompt: list[int],
    arrival: float,
) -> Submit:
    params = SamplingParams(max_tokens=0, temperature=0.0, pooling=Pooling(context.settings.pooling))
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        arrival=arrival,
        priority=body.priority or 0,
        lora_name=model.lora_name,
        lora_fingerprint=model.lora_fingerprint,
    )


async def _run(
    context: ServerContext, submits: Sequence[Submit], reservation: Reservation, request_id: str
) -> list[tuple[list[float], Ending]]:
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(context.client.submit(submit, reservation)) for submit in submits]
        return [await _read(stream, request_id) for stream in streams]


def _encode(context: ServerContext, body: EmbeddingRequest) -> list[list[int]]:
    """Token ids of each input. Raises BadRequestError."""
    prompts = [
        encode_prompt(context, value, noun="input", add_special_tokens=body.add_special_tokens is not False)
        for value in body.input
    ]
    if (num_tokens := body.truncate_prompt_tokens) is not None:
        num_tokens = context.max_model_len if num_tokens == -1 else num_tokens
        prompts = [truncated(prompt, num_tokens, body.truncation_side or "left") for prompt in prompts]
    for prompt in prompts:
        fit_max_tokens(0, len(prompt.token_ids), context.max_model_len, "input")
    return [prompt.token_ids for prompt in prompts]


async def _read(stream: RequestStream, request_id: str) -> tuple[list[float], Ending]:
    """The embedding, and how it came to its end."""
    events = [event async for batch in stream for event in batch]
    received = time.monotonic()
    if not events or any(event.finish_reason is not FinishReason.LENGTH for event in events):
        raise ServerError(request_id)
    last = events[-1]
    if last.embedding is None:
        raise ServerError(request_id)
    return last.embedding, Ending(last.times, num_output_tokens=0, received=received, detokenized=received)


def _answer(body: EmbeddingRequest, embeddings: Sequence[list[float]], num_tokens: int) -> bytes:
    data = [
        Embedding(embedding=_formatted(shortened(embedding, body.dimensions), body.encoding_format), index=index)
        for index, embedding in enumerate(embeddings)
    ]
    return msgspec.json.encode(EmbeddingList(data=data, model=body.model, usage=EmbeddingUsage(num_tokens, num_tokens)))


def shortened(embedding: list[float], num_dimensions: int | None) -> list[float]:
    """The first numbers, scaled to length 1."""
    if num_dimensions is None or num_dimensions == len(embedding):
        return embedding
    first = embedding[:num_dimensions]
    norm = math.hypot(*first) or 1.0
    return [value / norm for value in first]


def _formatted(embedding: list[float], encoding_format: str | None) -> list[float] | str:
    if encoding_format != "base64":
        return embedding
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
