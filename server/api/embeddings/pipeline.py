"""Runs a request for embeddings: validates it, submits each input as a prompt, and collects the embeddings."""

import secrets
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import msgspec
from fastapi import Request

from engine.shared.messages import FinishReason, Submit
from server.api.embeddings.conversion import encode_inputs, make_submit
from server.api.embeddings.schemas import EmbeddingRequest
from server.api.embeddings.writer import write_answer
from server.context import ServedModel, ServerContext, get_context
from server.engine_client.admission import Reservation
from server.engine_client.streams import RequestStream
from server.generation.preamble import begin
from server.generation.timings import ChoiceEnd, request_timings
from server.http.errors import InvalidValueError, ServerError

NO_SEED = 0  # nothing is sampled


def validate(request: Request, body: EmbeddingRequest) -> tuple[ServedModel, dict[str, str]]:
    """Return the model to use and the headers of the answer.

    Raises BadRequestError, ModelNotFoundError or EngineUnavailableError.
    """
    context = get_context(request)
    preamble = begin(request, body, model=body.model)
    size = context.model_config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = (
            f"Invalid 'dimensions': integer above maximum value. Expected a value <= {size}, "
            f"but got {body.dimensions} instead."
        )
        raise InvalidValueError(message, param="dimensions", code="integer_above_max_value")
    deterministic = "true" if context.client.ready_info().deterministic else "false"
    return preamble.model, {"x-lightwell-deterministic": deterministic, **preamble.accept()}


async def embed(request: Request, body: EmbeddingRequest, model: ServedModel) -> bytes:
    """Return the answer as JSON. If cancelled, abort its prompts in the engine. Raises APIError."""
    context, arrival, name = get_context(request), time.monotonic(), f"embd-{secrets.token_hex(16)}"
    # Reserve no more capacity than the engine can use at a time.
    size = min(len(body.input), context.client.ready_info().max_num_seqs, context.client.max_in_flight)
    embeddings: list[list[float]] = []
    endings: list[ChoiceEnd] = []
    with context.client.reserve(size, param="input") as reservation:
        prompts = await context.run_text_work(encode_inputs, context, body)
        submitted = time.monotonic()
        submits = [
            make_submit(context, body, model, f"{name}-{i}", prompt, arrival) for i, prompt in enumerate(prompts)
        ]
        while len(embeddings) < len(submits):
            waiting = submits[len(embeddings) :]
            num_ready = reservation.count or await context.client.refill(reservation, min(size, len(waiting)))
            for embedding, ending in await _run(context, waiting[:num_ready], reservation, request.state.request_id):
                embeddings.append(embedding)
                endings.append(ending)
    answer = await context.run_text_work(write_answer, body, embeddings, sum(map(len, prompts)))
    if not body.explain:
        return answer
    last = max(endings, key=_finished)
    timings = request_timings(last, arrival=arrival, submitted=submitted, seed=NO_SEED)
    return answer[:-1] + b',"lightwell":' + msgspec.json.encode(timings) + b"}"


def _finished(ending: ChoiceEnd) -> float:
    return (ending.times and ending.times.finished) or ending.received


async def _run(
    context: ServerContext, submits: Sequence[Submit], reservation: Reservation, request_id: str
) -> list[tuple[list[float], ChoiceEnd]]:
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(context.client.submit(submit, reservation)) for submit in submits]
        return [await _read(stream, request_id) for stream in streams]


async def _read(stream: RequestStream, request_id: str) -> tuple[list[float], ChoiceEnd]:
    """Return the embedding, and how its prompt ended. Raises ServerError if there is none."""
    events = [event async for batch in stream for event in batch]
    received = time.monotonic()
    if not events or any(event.finish_reason is not FinishReason.LENGTH for event in events):
        raise ServerError(request_id)
    last = events[-1]
    if last.embedding is None:
        raise ServerError(request_id)
    return last.embedding, ChoiceEnd(last.times, num_output_tokens=0, received=received, detokenized=received)
