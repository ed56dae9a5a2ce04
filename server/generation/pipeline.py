"""The one way from a request to its answer: judge, reserve, encode, submit, then stream or collect."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import anyio.to_thread
import msgspec
from anyio import CapacityLimiter
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from engine.shared.messages import EngineInfo, Submit
from server.api.chat.prompt import unread_options
from server.constrained.constraints import Constraint, check_constraint
from server.context import ServedModel, ServerContext, get_context
from server.engine_client.client import RequestStream, Reservation
from server.generation.choice_state import ChoiceParts, ChoiceState, Delta, Whole, best_choices
from server.generation.endpoint import Endpoint, Head, Writer
from server.generation.generation import Generation
from server.generation.pacing import paced
from server.generation.parameters import (
    check_token_ids,
    choose_seed,
    prompt_seed,
    sampling_params,
    unknown_parameters,
    warnings_header,
    with_num_logprobs,
)
from server.generation.prompts import Prompt, fit_max_tokens, truncated, vocab_size
from server.generation.reasoning_budget import thinking_limit
from server.generation.recordings import Recording
from server.generation.registry import RunningRequest
from server.generation.timings import account_of
from server.generation.tokenized_settings import TokenizedSettings, tokenize_settings
from server.http.errors import APIError, ServerError
from server.http.sse import run_until_disconnect, sse_response
from server.schemas.common import Account, GenerationRequest
from server.schemas.render import RenderedPrompt
from server.text.choice_text import ChoiceText
from server.text.output_parser import OutputParser

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class _Job(Generic[Body]):
    """A request that has been judged."""

    context: ServerContext
    endpoint: Endpoint[Body]
    body: Body
    model: ServedModel
    info: EngineInfo
    head: Head
    seed: int
    arrival: float  # of time.monotonic()
    request_id: str  # for logs and errors
    unknown: list[str]  # fields that are ignored

    @property
    def ids(self) -> tuple[str, ...]:
        """By which it can be cancelled and replayed."""
        own = () if self.body.request_id is None else (self.body.request_id,)
        return self.head.id, self.request_id, *own


async def respond(request: Request, body: Body, endpoint: Endpoint[Body]) -> Response:
    """Raises APIError for all that goes wrong before the first byte of the answer."""
    job = _judge(request, body, endpoint)
    generation, running, writer = await _start(job)
    if body.stream:
        return sse_response(
            _stream(job, generation, writer),
            on_close=running.close,
            on_error=writer.failure,
            headers=_headers(job),
            request_id=job.request_id,
        )
    try:
        content = await run_until_disconnect(request, _collect(job, generation, writer))
    finally:
        running.close()
    return Response(content, headers=_headers(job), media_type="application/json")


async def start_in_background(
    request: Request, body: Body, endpoint: Endpoint[Body], on_end: Callable[[], None]
) -> tuple[Head, dict[str, str]]:
    """Generates without the connection; the answer, or its stream, is the writer's to keep.

    `on_end` is called when that is done. Returns the head of the answer, and headers for who asked. Raises APIError for
    all that goes wrong before.
    """
    job = _judge(request, body, endpoint)
    generation, running, writer = await _start(job)

    async def generate() -> None:
        try:
            if body.stream:
                async for _ in _stream(job, generation, writer):
                    pass
            else:
                await _collect(job, generation, writer)
        except APIError as error:
            writer.failure(error)
        except Exception:
            logger.exception("a request in the background failed", extra={"request_id": job.request_id})
            writer.failure(ServerError(job.request_id))
        finally:
            running.close()
            on_end()

    task = asyncio.create_task(generate())
    job.context.background_tasks.add(task)
    task.add_done_callback(job.context.background_tasks.discard)
    return job.head, _headers(job)


async def render(request: Request, body: Body, endpoint: Endpoint[Body]) -> tuple[list[RenderedPrompt], dict[str, str]]:
    """The prompts as the engine would get them, and headers. Nothing is generated. Raises APIError."""
    job = _judge(request, body, endpoint, default_seed=0)  # which takes no number from those that generate
    context = job.context

    prepared = await _prepare(job, context.tokenize_threads)

    def encode() -> list[RenderedPrompt]:
        return [_rendered(job, submit) for submit in prepared.submits]

    rendered = await anyio.to_thread.run_sync(encode, limiter=context.tokenize_threads)
    headers = {name: value for name, value in _headers(job).items() if name != "x-lightwell-seed"}
    return rendered, headers


def _rendered(job: _Job[Body], submit: Submit) -> RenderedPrompt:
    params = {name: getattr(submit.params, name) for name in submit.params.__struct_fields__}
    return RenderedPrompt(
        request_id=submit.request_id,
        model=job.model.name,
        prompt=job.context.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False),
        token_ids=submit.prompt_token_ids,
        max_tokens=submit.params.max_tokens,
        sampling_params=params | {"seed": None if job.body.chosen_seed is None else submit.params.seed},
    )


def _judge(request: Request, body: Body, endpoint: Endpoint[Body], *, default_seed: int | None = None) -> _Job[Body]:
    """All that can be said without tokenizing. Raises BadRequestError, ModelNotFoundError, EngineUnavailableError.

    A request without a seed gets `default_seed`, or one that is chosen.
    """
    arrival = time.monotonic()
    context = get_context(request)
    model = context.find_model(body.model)
    unread = unread_options(context.chat_template, body)
    unknown = unknown_parameters(body, strict=context.settings.strict, unread=unread)
    body.check()
    info = context.client.ready_info()
    check_token_ids(body, vocab_size(context), context.model_config.eos_token_ids)
    body = with_num_logprobs(body, context.settings.max_logprobs, vocab_size(context))
    context.metrics.count_unknown_parameters(len(unknown))
    seed = default_seed if body.chosen_seed is None else body.chosen_seed
    return _Job(
        context=context,
        endpoint=endpoint,
        body=body,
        model=model,
        info=info,
        head=Head(
            f"{endpoint.id_prefix}{secrets.token_hex(16)}",
            int(time.time()),
            model.name,
            context.fingerprint(model),
        ),
        seed=choose_seed(context.settings.seed, _next_number(request)) if seed is None else seed,
        arrival=arrival,
        request_id=request.state.request_id,
        unknown=unknown,
    )


def _next_number(request: Request) -> int:
    """How many requests came before this one that brought no seed."""
    state = request.app.state
    number: int = getattr(state, "num_unseeded_requests", 0)
    state.num_unseeded_requests = number + 1
    return number


def _headers(job: _Job[Body]) -> dict[str, str]:
    deterministic = "true" if job.info.deterministic else "false"
    headers = {"x-lightwell-seed": str(job.seed), "x-lightwell-deterministic": deterministic}
    if job.unknown:
        headers["x-lightwell-warnings"] = warnings_header(job.unknown)
    return headers


async def _start(job: _Job[Body]) -> tuple[Generation, RunningRequest, Writer]:
    """Slots come first, so that a request for which there is no room costs no tokenizing."""
    context, body = job.context, job.body
    param = "n" if body.num_choices > 1 else job.endpoint.noun
    with context.client.reserve(body.num_prompts * body.num_choices, param=param) as reservation:
        prepared = await _prepare(job, context.text_threads)
        context.metrics.observe_tokenizer(prepared.tokenizer_seconds)
        prompts, submitted = prepared.prompts, time.monotonic()
        choices = [_choice(job, prompts, index) for index in range(len(prompts) * body.num_choices)]
        recording = None
        if context.recordings.max_requests:
            recording = Recording(prepared.submits, ids=job.ids)
        streams = _send(context, prepared.submits if recording is None else recording.submits, reservation)
    generation = Generation(
        prompts,
        streams,
        choices,
        metrics=context.metrics,
        request_id=job.request_id,
        submitted=submitted,
        recording=recording,
    )
    on_close = None if recording is None else partial(context.recordings.add, recording)
    running = context.running.add(generation, *job.ids, on_close=on_close)
    return generation, running, job.endpoint.writer(context, body, job.head, prompts)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request as the engine gets it."""

    prompts: list[Prompt]
    submits: list[Submit]  # one for each prompt
    constraint: Constraint | None  # of all of them
    tokenizer_seconds: float


async def _prepare(job: _Job[Body], threads: CapacityLimiter) -> _Prepared:
    """What takes long: the prompts, what else the tokenizer makes, and what answers must match.

    Raises BadRequestError.
    """
    prepared = await anyio.to_thread.run_sync(_tokenize, job, limiter=threads)
    if prepared.constraint is not None:
        await check_constraint(job.context, prepared.constraint, job.body)
    return prepared


def _tokenize(job: _Job[Body]) -> _Prepared:
    start = time.monotonic()
    prompts, tokenized = _encode(job)
    seconds = time.monotonic() - start
    # Of several prompts none has a part in it: only the one of a chat has.
    constraint = job.endpoint.constraint(job.context, job.body, prompts[0])
    grammar = None if constraint is None else constraint.grammar
    submits = [_submit(job, prompt, index, tokenized, grammar) for index, prompt in enumerate(prompts)]
    return _Prepared(prompts, submits, constraint, seconds)


def _encode(job: _Job[Body]) -> tuple[list[Prompt], TokenizedSettings]:
    prompts = encode_prompts(job.context, job.body, job.endpoint)
    return prompts, tokenize_settings(job.context, job.body)


def encode_prompts(context: ServerContext, body: Body, endpoint: Endpoint[Body]) -> list[Prompt]:
    """As the engine gets them. Raises BadRequestError."""
    prompts = endpoint.encode(context, body)
    if (num_tokens := body.truncate_prompt_tokens) is not None:
        room = context.max_model_len - (1 if body.max_output_tokens is None else body.max_output_tokens)
        num_tokens = max(1, room) if num_tokens == -1 else num_tokens
        prompts = [truncated(prompt, num_tokens, body.truncation_side or "left") for prompt in prompts]
    return prompts


def _submit(job: _Job[Body], prompt: Prompt, index: int, tokenized: TokenizedSettings, grammar: str | None) -> Submit:
    """Raises ContextLengthExceededError, or InvalidValueError for a min_tokens that cannot be."""
    context, body, num_prompt_tokens = job.context, job.body, len(prompt.token_ids)
    max_tokens = fit_max_tokens(
        body.max_output_tokens,
        num_prompt_tokens,
        context.max_model_len,
        job.endpoint.noun,
        default=body.default_max_output_tokens,
    )
    params = sampling_params(
        body,
        tokenized,
        max_tokens=max_tokens,
        seed=prompt_seed(job.seed, index),
        vocab_size=vocab_size(context),
        defaults=context.model_config.default_sampling,
    )
    return Submit(
        request_id=f"{job.head.id}-{index}",
        prompt_token_ids=prompt.token_ids,
        params=msgspec.structs.replace(params, grammar=grammar, thinking=thinking_limit(context, body, prompt)),
        arrival=job.arrival,
        n=body.num_choices,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        lora_name=job.model.lora_name,
        lora_fingerprint=job.model.lora_fingerprint,
    )


def _send(context: ServerContext, submits: Sequence[Submit], reservation: Reservation) -> list[RequestStream]:
    """All of them or none."""
    streams: list[RequestStream] = []
    try:
        for submit in submits:
            streams.append(context.client.submit(submit, reservation))
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams


def _choice(job: _Job[Body], prompts: Sequence[Prompt], index: int) -> ChoiceState:
    context, body = job.context, job.body
    include_stop = bool(body.include_stop_str_in_output)
    skip_special_tokens = body.skip_special_tokens is not False
    format = prompts[index // body.num_choices].output_format
    # Control tokens that tell the parts of an answer apart are never skipped, but they are no content.
    special = {} if format is None else context.tokenizer.special_ids_of(format.markers)
    parts = None
    if format is not None:
        parser = OutputParser(format, hidden=tuple(special) if skip_special_tokens else ())
        parts = ChoiceParts(parser, f"{job.head.id}-{index}")
    text = ChoiceText(
        context.tokenizer,
        stop=body.stop or (),
        include_stop=include_stop,
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=skip_special_tokens,
        shown_ids=frozenset(special.values()),
        track_offsets=body.num_logprobs is not None,
    )
    stop_token_ids = body.stop_token_ids or ()
    return ChoiceState(index, text, include_stop=include_stop, stop_token_ids=stop_token_ids, parts=parts)


def _account(job: _Job[Body], generation: Generation) -> Account | UnsetType:
    if not job.body.wants_account or generation.ending is None:
        return UNSET
    return account_of(generation.ending, arrival=job.arrival, submitted=generation.submitted, seed=job.seed)


async def _collect(job: _Job[Body], generation: Generation, writer: Writer) -> bytes:
    """The answer as JSON."""
    body = job.body
    wholes = [Whole(index) for index in range(len(generation.choices))]
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                wholes[delta.index].add(delta)

    def encode() -> bytes:
        best = best_choices([whole.join() for whole in wholes], body.num_choices, body.num_answered)
        return msgspec.json.encode(writer.answer(best, generation.usage, _account(job, generation)))

    # Log probabilities may be hundreds of thousands of entries.
    is_short = body.num_logprobs is None and body.num_prompt_logprobs is None
    return encode() if is_short else await job.context.run_text_work(encode)


async def _stream(job: _Job[Body], generation: Generation, writer: Writer) -> AsyncGenerator[bytes, None]:
    """Server-sent events; all that one step of the engine yields is one write."""

    def encode(batch: list[Delta]) -> bytes:
        return writer.events(batch, generation.usage)

    if opening := encode([]):  # what names the answer does not wait for its first token
        yield opening
    interval = job.body.stream_interval or 1
    deltas = generation.deltas()
    batches = deltas if interval == 1 else paced(deltas, interval)
    in_thread = job.body.num_prompt_logprobs is not None  # a batch may have very many then
    async with aclosing(deltas), aclosing(batches):
        async for batch in batches:
            if events := await job.context.run_text_work(encode, batch) if in_thread else encode(batch):
                yield events
    yield writer.end(generation.usage, _account(job, generation))
