"""Answers a request for embeddings: validates it, submits each input as a prompt, and collects the embeddings."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request, Response

from engine.shared.messages import Submit
from server.generation.preamble import begin, find_model
from server.generation.prompt_batch import PromptBatch, answer_prompts
from server.generation.timings import ChoiceEnd, request_timings
from server.http.errors import InvalidValueError, ServerError
from server.models.served_model import ModelVariant
from server.parts.embeddings.conversion import encode_inputs, make_submit
from server.parts.embeddings.schemas import EmbeddingRequest
from server.schemas.answers import RequestTimings

NO_SEED = 0  # nothing is sampled


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The result of a request. Times are `time.monotonic()`."""

    vectors: list[list[float]]  # of length 1 (L2 norm), one for each input
    num_tokens: int  # of all inputs
    arrival: float
    submitted: float
    last_end: ChoiceEnd

    def timings(self) -> RequestTimings:
        """Return the timings of the request, to be called when its answer is complete except for them."""
        return request_timings(
            self.last_end, arrival=self.arrival, submitted=self.submitted, now=time.monotonic(), seed=NO_SEED
        )


async def respond(request: Request, body: EmbeddingRequest, write: Callable[[Embeddings], bytes]) -> Response:
    """Answer with what `write`, called in a thread, makes of the embeddings. Raises APIError."""
    model, headers = _validate(request, body)
    return await _embed(request, body, model, headers, write)


def _validate(request: Request, body: EmbeddingRequest) -> tuple[ModelVariant, dict[str, str]]:
    """Return the model to use and the headers of the answer.

    Raises BadRequestError, ModelNotFoundError or EngineUnavailableError.
    """
    model = find_model(request, body.model)
    preamble = begin(request, body)
    size = model.base.config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = (
            f"Invalid 'dimensions': integer above maximum value. Expected a value <= {size}, "
            f"but got {body.dimensions} instead."
        )
        raise InvalidValueError(message, param="dimensions", code="integer_above_max_value")
    return model, {"x-lightwell-deterministic": model.base.deterministic, **preamble.accept()}


async def _embed(
    request: Request,
    body: EmbeddingRequest,
    model: ModelVariant,
    headers: dict[str, str],
    write: Callable[[Embeddings], bytes],
) -> Response:
    arrival, name = time.monotonic(), f"embd-{secrets.token_hex(16)}"

    def make_submits() -> list[Submit]:
        return [
            make_submit(model, f"{name}-{index}", token_ids, arrival, priority=body.priority or 0)
            for index, token_ids in enumerate(encode_inputs(model.base, body))
        ]

    def write_batch(batch: PromptBatch) -> bytes:
        vectors = [event.embedding for event in batch.events if event.embedding is not None]
        if len(vectors) < len(batch.events):
            raise ServerError(request.state.request_id)
        return write(Embeddings(vectors, batch.num_prompt_tokens, arrival, batch.submitted, batch.last_end))

    return await answer_prompts(
        request, model.base, body, make_submits, len(body.input), param="input", write=write_batch, headers=headers
    )
