"""`POST /v1/embeddings`, and what other endpoints need that run prompts for one result each."""

import base64
import math
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType
from pydantic import Field

from engine.shared.messages import FinishReason, Pooling, SamplingParams, Submit, TokenEvent
from server.api.completions.schemas import PromptInput, prompts_validator
from server.context import get_context
from server.dialect import BEGINNING, Dialect, ModelRoute, Operation
from server.engine_client.answer_budget import NUMBER_BYTES, AnswerShare, too_large_error
from server.engine_client.client import EngineClient
from server.engine_client.reservation import Reservation
from server.engine_client.streams import RequestStream
from server.generation.generation import ChoiceEnd, request_timings
from server.generation.preamble import Preamble, begin, find_model
from server.generation.prompts import encode_prompt, fit_max_tokens, truncate_prompt
from server.http.errors import InvalidValueError, ServerError
from server.http.request_middleware import LOG_FIELDS
from server.http.responses import AnswerResponse
from server.models.served_model import ModelVariant, ServedModel
from server.part import Part
from server.schemas.answers import RequestTimings
from server.schemas.request_fields import LightwellOptions, QueueFields, TruncatedLength, TruncationSide, optional
from server.tenants import get_tenant

MAX_INPUTS = 2048  # OpenAI's limit

Inputs = Annotated[list[PromptInput], prompts_validator(MAX_INPUTS)]
NO_SEED = 0  # nothing is sampled


class EmbeddingRequest(QueueFields):
    model: str = Field(description="Name of the model, as listed by GET /v1/models.")
    input: Inputs = Field(description="One or more inputs, as text or token ids.")
    encoding_format: Literal["float", "base64"] | None = optional(
        "float: a list of numbers. base64: their encoding as little-endian float32. Default float."
    )
    add_special_tokens: bool | None = optional(
        "Add the special tokens that the model expects around a text. Default true."
    )
    truncate_prompt_tokens: TruncatedLength | None = optional(
        "Truncate each input to this many tokens; -1: to the maximum model length. Default: never."
    )
    truncation_side: TruncationSide | None = optional(
        "Side from which truncate_prompt_tokens removes tokens. Default left: the beginning."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Number of dimensions to keep; the result is rescaled to length 1. Default: all."
    )
    lightwell: LightwellOptions | None = optional("Options specific to this server.")

    @property
    def explain(self) -> bool:
        """True if the answer should include the request's timings."""
        return self.lightwell is not None and bool(self.lightwell.explain)


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """An embedding of length 1 (L2 norm)."""

    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str
    index: int  # of the input


class PromptUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PromptUsage
    lightwell: RequestTimings | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """The last event of each prompt, in order, and when the prompts were sent and ended: `time.monotonic()`."""

    events: list[TokenEvent]
    num_tokens: int  # of all prompts
    arrival: float
    submitted: float
    last_end: ChoiceEnd

    @property
    def vectors(self) -> list[list[float]]:
        """The embeddings of the prompts, of length 1 (L2 norm)."""
        return [event.embedding or [] for event in self.events]

    def timings(self) -> RequestTimings:
        """Return the timings of the request, to be called when its answer is complete except for them."""
        return request_timings(
            self.last_end, arrival=self.arrival, submitted=self.submitted, now=time.monotonic(), seed=NO_SEED
        )


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts that end with their first event."""

    encode: Callable[[], Sequence[list[int]]]  # returns their token ids; runs in a thread, once capacity is reserved
    count: int
    params: SamplingParams
    id_prefix: str
    param: str  # the field that holds them, for errors


async def answer_prompts(
    request: Request,
    model: ModelVariant,
    body: QueueFields,
    prompts: Prompts,
    write: Callable[[PromptBatch], bytes],
    preamble: Preamble,
) -> AnswerResponse:
    """Answer with what `write`, which runs in a thread, makes of the events of prompts. It counts until it is sent.

    If cancelled, abort the prompts in the engine. Raises APIError.
    """
    arrival, context, client = time.monotonic(), get_context(request), model.base.client
    headers = {"x-lightwell-deterministic": model.base.deterministic, **preamble.accept()}
    name = f"{prompts.id_prefix}-{secrets.token_hex(16)}"
    # Reserve no more capacity than the engine can use at a time.
    size = min(prompts.count, client.max_num_seqs, client.max_in_flight)
    tenant, timeout = get_tenant(request), body.queue_timeout
    with await client.admit(size, param=prompts.param, tenant=tenant, queue_timeout=timeout) as reservation:
        too_large = partial(too_large_error, prompts.param, "answer", context.answers.max_bytes)
        share = reservation.answer = AnswerShare(context.answers, tenant, reservation.fail, too_large)
        try:
            submits = [
                Submit(
                    request_id=f"{name}-{number}",
                    prompt_token_ids=token_ids,
                    params=prompts.params,
                    arrival=arrival,
                    priority=body.priority or 0,
                    lora_name=model.lora_name,
                    lora_fingerprint=model.lora_fingerprint,
                    ids=(request.state.request_id,),
                    prompt=number,
                )
                for number, token_ids in enumerate(await context.run_text_work(request, prompts.encode))
            ]
            num_embeddings = sum(submit.params.pooling is not None for submit in submits)
            if NUMBER_BYTES * model.base.config.hidden_size * num_embeddings > context.answers.max_bytes:
                raise share.too_large()
            submitted = time.monotonic()
            events, endings = await _run_prompts(request, client, submits, reservation, size)
            num_tokens = sum(len(submit.prompt_token_ids) for submit in submits)
            request.scope["state"][LOG_FIELDS] = lambda: {"prompt_tokens": num_tokens}
            last = max(endings, key=lambda ending: (ending.times and ending.times.finished) or ending.received)
            batch = PromptBatch(events, num_tokens, arrival, submitted, last)
            content = await context.run_text_work(request, write, batch)
        except BaseException:
            share.release()
            raise
    return AnswerResponse(content, share, headers)


async def _run_prompts(
    request: Request, client: EngineClient, submits: Sequence[Submit], reservation: Reservation, size: int
) -> tuple[list[TokenEvent], list[ChoiceEnd]]:
    """Run prompts, up to `size` at a time. Return the last event of each, and how it ended."""
    events: list[TokenEvent] = []
    endings: list[ChoiceEnd] = []
    while len(events) < len(submits):
        waiting = submits[len(events) :]
        num_ready = reservation.count or await client.refill(reservation, min(size, len(waiting)))
        async with AsyncExitStack() as stack:
            ready = waiting[:num_ready]
            streams = [await stack.enter_async_context(client.submit(submit, reservation)) for submit in ready]
            for stream in streams:
                events.append(await _last_event(stream, request.state.request_id))
                now = time.monotonic()
                endings.append(ChoiceEnd(events[-1].times, len(events[-1].token_ids), received=now, detokenized=now))
    return events, endings


async def _last_event(stream: RequestStream, request_id: str) -> TokenEvent:
    """Return the last event of a prompt. Raises ServerError if it failed."""
    events = [event async for batch in stream for event in batch]
    if not events or any(event.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP) for event in events):
        raise ServerError(request_id)
    return events[-1]


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


def embedding_params(model: ServedModel) -> SamplingParams:
    """Return the parameters of a prompt whose embedding is asked for: no tokens are generated."""
    return SamplingParams(max_tokens=0, temperature=0.0, pooling=Pooling(model.settings.pooling))


async def respond(request: Request, body: EmbeddingRequest, write: Callable[[PromptBatch], bytes]) -> Response:
    """Answer with what `write`, called in a thread, makes of the embeddings. Raises APIError."""
    model = find_model(request, body.model)
    preamble = begin(request, body)
    size = model.base.config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = (
            f"Invalid 'dimensions': integer above maximum value. Expected a value <= {size}, "
            f"but got {body.dimensions} instead."
        )
        raise InvalidValueError(message, param="dimensions", code="integer_above_max_value")

    def write_all(batch: PromptBatch) -> bytes:
        if any(event.embedding is None for event in batch.events):
            raise ServerError(request.state.request_id)
        return write(batch)

    prompts = Prompts(
        encode=partial(encode_inputs, model.base, body),
        count=len(body.input),
        params=embedding_params(model.base),
        id_prefix="embd",
        param="input",
    )
    return await answer_prompts(request, model, body, prompts, write_all, preamble)


def write_answer(body: EmbeddingRequest, batch: PromptBatch) -> bytes:
    """Return the answer as JSON."""
    data = [
        Embedding(embedding=_format(shorten(vector, body.dimensions), body.encoding_format), index=index)
        for index, vector in enumerate(batch.vectors)
    ]
    usage = PromptUsage(batch.num_tokens, batch.num_tokens)
    answer = msgspec.json.encode(EmbeddingList(data=data, model=body.model, usage=usage))
    if not body.explain:
        return answer
    return answer[:-1] + b',"lightwell":' + msgspec.json.encode(batch.timings()) + b"}"


def shorten(embedding: list[float], num_dimensions: int | None) -> list[float]:
    """Return the first `num_dimensions` numbers of an embedding, scaled to length 1 (L2)."""
    if num_dimensions is None or num_dimensions == len(embedding):
        return embedding
    first = embedding[:num_dimensions]
    norm = math.hypot(*first) or 1.0
    return [value / norm for value in first]


def _format(embedding: list[float], encoding_format: str | None) -> list[float] | str:
    if encoding_format != "base64":
        return embedding
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()


router = APIRouter(route_class=ModelRoute)


@router.post("/v1/embeddings")
async def create_embedding(request: Request, body: EmbeddingRequest) -> Response:
    """Return the embeddings of one or more texts."""
    return await respond(request, body, partial(write_answer, body))


EMBEDDINGS = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={("/v1/embeddings", "post"): Operation(EmbeddingList, {"input": BEGINNING}, reaches_engine=True)},
    in_workers=True,
)

PART = Part(dialects=[EMBEDDINGS])
