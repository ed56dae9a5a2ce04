"""The way from a request to its answer: validate, reserve, encode, submit, then stream or collect."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from engine.shared.messages import EngineInfo, Submit
from server.constrained.messages import encode_request
from server.context import ServerContext, get_context
from server.engine_client.answer_budget import AnswerShare
from server.engine_client.answer_size import least_bytes, prompt_bytes, too_large
from server.generation.choice_delta import ChoiceAccumulator, best_choices, pace
from server.generation.choice_state import ChoiceParser, ChoiceState
from server.generation.endpoint import AnswerMetadata, Endpoint, Writer
from server.generation.generation import Generation
from server.generation.parameters import (
    check_token_ids,
    prompt_seed,
    resolve_num_logprobs,
    sampling_params,
)
from server.generation.preamble import WARNINGS, Preamble, begin, find_generating_model, next_seed
from server.generation.prompts import Prompt, fit_max_tokens, max_prompt_tokens, truncate_prompt, vocab_size
from server.generation.reasoning_budget import reasoning_limit
from server.generation.request_span import RequestSpan
from server.generation.timings import request_timings
from server.generation.tokenized_settings import TokenizedSettings, tokenize_settings
from server.http.bodies import get_text_size
from server.http.errors import APIError, ServerError
from server.http.json_response import AnswerResponse
from server.http.request_middleware import LOG_FIELDS
from server.http.sse import KEEP_ALIVE_SECONDS, SERVER_SENT_EVENTS, StreamFormat, run_until_disconnect, sse_response
from server.models.served_model import ModelVariant, ServedModel
from server.recordings import Recording
from server.running_requests import RunningRequest
from server.schemas.answers import RequestTimings
from server.schemas.generation_request import GenerationRequest
from server.schemas.rendered_prompt import RenderedPrompt
from server.tenants import Tenant, get_tenant
from server.text.choice_text import ChoiceText

logger = logging.getLogger(__name__)

# A stream's status is held back until the engine has begun with the request, so that one that has to make room for
# another gets a real 429, which clients retry. After this time it is sent, since idle connections need comments.
MAX_HELD_SECONDS = KEEP_ALIVE_SECONDS

Body = TypeVar("Body", bound=GenerationRequest)

LONG_BYTES = 1 << 18  # of output; encoding it takes some milliseconds
NUM_REPEATS = 4  # of the output in the last events of a stream that repeats it


@dataclass(frozen=True, slots=True)
class _Job(Generic[Body]):
    """A validated request."""

    context: ServerContext
    endpoint: Endpoint[Body]
    body: Body
    model: ModelVariant
    info: EngineInfo
    metadata: AnswerMetadata
    seed: int
    arrival: float  # seconds of time.monotonic()
    request_id: str  # for logs and errors
    preamble: Preamble
    tenant: Tenant
    text_size: int  # bytes

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids by which the request can be cancelled and replayed."""
        own = () if self.body.request_id is None else (self.body.request_id,)
        return self.metadata.id, self.request_id, *own


@dataclass(frozen=True, slots=True)
class _Started:
    """A request that has been submitted to the engine."""

    generation: Generation
    running: RunningRequest
    writer: Writer
    share: AnswerShare  # of the answer
    num_prompt_bytes: int  # of the prompts' part of the answer
    headers: dict[str, str]  # of the response
    span: RequestSpan
    on_end: Callable[[], None]

    def failure(self, error: APIError) -> bytes:
        """Return the last events of a stream that failed."""
        self.span.fail(error)
        return self.writer.failure(error)

    def end(self) -> None:
        """End the generation."""
        self.running.close()
        self.span.end()
        self.on_end()

    def close(self) -> None:
        """End the generation, and count its answer no longer."""
        self.share.release()
        self.end()


async def respond(
    request: Request,
    body: Body,
    endpoint: Endpoint[Body],
    *,
    stream_format: StreamFormat = SERVER_SENT_EVENTS,
    on_end: Callable[[], None] = lambda: None,
) -> Response:
    """Answer a request, as JSON or as a stream. `on_end` is called when the generation has ended.

    Raises APIError for errors before the first byte of the answer.
    """
    job, started = await run_until_disconnect(request, _begin(request, body, endpoint, on_end))
    request.scope["state"][LOG_FIELDS] = started.generation.log_fields
    try:
        if body.stream:
            await run_until_disconnect(request, started.generation.reservation.wait_for_start(MAX_HELD_SECONDS))
        else:
            content = await run_until_disconnect(request, _collect(job, started))
    except BaseException as error:
        started.span.fail(error)
        started.close()
        raise
    if not body.stream:
        started.end()
        return AnswerResponse(content, started.share, started.headers)
    return sse_response(
        _stream(job, started),
        on_close=started.close,
        on_error=started.failure,
        headers=started.headers,
        request_id=job.request_id,
        format=stream_format,
    )


async def start_in_background(
    request: Request, body: Body, endpoint: Endpoint[Body], on_end: Callable[[], None]
) -> tuple[AnswerMetadata, dict[str, str]]:
    """Answer a request in a task that outlives the connection. The writer keeps the answer or its stream.

    `on_end` is called when the task is done. Returns the metadata of the answer and the headers of the response to the
    client. Raises APIError for errors before the generation starts.
    """
    job, started = await run_until_disconnect(request, _begin(request, body, endpoint, on_end))
    started.generation.reservation.is_answered = True
    account = job.tenant.account

    async def generate() -> None:
        account.num_running += 1
        try:
            if body.stream:
                async for _ in _stream(job, started):
                    pass
            else:
                await _collect(job, started)
        except APIError as error:
            started.failure(error)
        except Exception:
            logger.exception("a background request failed", extra={"request_id": job.request_id})
            started.failure(ServerError(job.request_id))
        finally:
            account.num_running -= 1
            started.close()
            fields = {**started.generation.log_fields(), "request_id": job.request_id}
            logger.info("%s ended in the background", job.metadata.id, extra={"fields": fields})

    task = asyncio.create_task(generate())
    job.context.background_tasks.add(task)
    task.add_done_callback(job.context.background_tasks.discard)
    return job.metadata, started.headers


async def render(request: Request, body: Body, endpoint: Endpoint[Body]) -> tuple[list[RenderedPrompt], dict[str, str]]:
    """Return the prompts as they would be sent to the engine, and response headers. Raises APIError."""
    job = await _validate(
        request, body, endpoint, default_seed=0
    )  # rendering must not change the seeds of later requests
    context = job.context
    prepared = await run_until_disconnect(request, _prepare(job))

    def encode() -> list[RenderedPrompt]:
        return [_rendered(job, submit) for submit in prepared.submits]

    rendered = await context.run_text_work(request, encode)
    headers = {name: value for name, value in _headers(job, prepared).items() if name != "x-lightwell-seed"}
    return rendered, headers


def _rendered(job: _Job[Body], submit: Submit) -> RenderedPrompt:
    params = dict(zip(submit.params.__struct_encode_fields__, msgspec.structs.astuple(submit.params), strict=True))
    return RenderedPrompt(
        request_id=submit.request_id,
        model=job.model.name,
        prompt=job.model.base.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False),
        token_ids=submit.prompt_token_ids,
        max_tokens=submit.params.max_tokens,
        sampling_params=params | {"seed": None if job.body.requested_seed is None else submit.params.seed},
    )


async def _validate(
    request: Request, body: Body, endpoint: Endpoint[Body], *, default_seed: int | None = None
) -> _Job[Body]:
    """Make all checks that need no tokenizer.

    A request without a seed gets `default_seed`, or a seed that is chosen here. Raises BadRequestError,
    ModelNotFoundError or EngineUnavailableError.
    """
    arrival = time.monotonic()
    context = get_context(request)
    model = find_generating_model(request, body.model)
    base, ignored = model.base, endpoint.ignored_fields(model.base, body)
    preamble = begin(request, body, is_model_missing=body.model is None, ignored=ignored)
    body.check()
    info = base.client.ready_info()
    check_token_ids(body, vocab_size(base), base.config.eos_token_ids)
    body = resolve_num_logprobs(body, context.settings.max_logprobs, vocab_size(base))
    body = base.default_sampling.apply(body)
    seed = default_seed if body.requested_seed is None else body.requested_seed
    return _Job(
        context=context,
        endpoint=endpoint,
        body=body,
        model=model,
        info=info,
        metadata=AnswerMetadata(
            id=f"{endpoint.id_prefix}{secrets.token_hex(16)}",
            created=int(time.time()),
            model=model.name,
            system_fingerprint=model.system_fingerprint,
        ),
        seed=await next_seed(context) if seed is None else seed,
        arrival=arrival,
        request_id=request.state.request_id,
        preamble=preamble,
        tenant=get_tenant(request),
        text_size=get_text_size(request),
    )


def _headers(job: _Job[Body], prepared: "_Prepared") -> dict[str, str]:
    warnings, requested = job.preamble.accept(), job.body.max_output_tokens
    max_tokens = min(submit.params.max_tokens for submit in prepared.submits)
    if requested is not None and requested > max_tokens:
        capped = f"{job.endpoint.max_tokens_field(job.body)} capped at {max_tokens}, the rest of the context"
        warnings[WARNINGS] = "; ".join([*warnings.values(), capped])
    priority = job.body.priority or 0
    if job.tenant.allowed_priority(priority) != priority:
        warnings[WARNINGS] = "; ".join([*warnings.values(), "priority raised to 0: the API key allows no lower one"])
    return {"x-lightwell-seed": str(job.seed), "x-lightwell-deterministic": job.model.base.deterministic, **warnings}


async def _begin(
    request: Request, body: Body, endpoint: Endpoint[Body], on_end: Callable[[], None]
) -> tuple[_Job[Body], _Started]:
    """Validate a request and submit it to the engine. Raises APIError."""
    span = RequestSpan(request, body, endpoint.operation)
    try:
        job = await _validate(request, body, endpoint)
        return job, await _start(job, span, on_end)
    except BaseException as error:
        span.fail(error)
        span.end()
        raise


async def _start(job: _Job[Body], span: RequestSpan, on_end: Callable[[], None]) -> _Started:
    """Reserve capacity, tokenize the request and submit it to the engine.

    Capacity is reserved first: a request that exceeds it must be refused before time is spent on tokenizing it.
    """
    context, body, base = job.context, job.body, job.model.base
    param = "n" if body.num_choices > 1 else job.endpoint.noun
    count = body.num_prompts * body.num_choices
    queue_timeout = body.queue_timeout
    with await base.client.admit(count, param=param, tenant=job.tenant, queue_timeout=queue_timeout) as reservation:
        prepared = await _prepare(job)
        base.metrics.observe_tokenizer(prepared.tokenizer_seconds)
        answers = context.answers
        limit_error = too_large(body, job.endpoint.max_tokens_field(body), answers.max_bytes)
        if least_bytes(body, prepared.submits) > answers.max_bytes:
            raise limit_error
        prompts, submitted = prepared.prompts, time.monotonic()
        choices = [_make_choice(job, prompts, index) for index in range(len(prompts) * body.num_choices)]
        recording = None
        if context.recordings.max_requests:
            recording = Recording(prepared.submits, job.ids, job.tenant.owner, base.name)
        streams = base.client.submit_all(prepared.submits if recording is None else recording.submits, reservation)
    generation = Generation(
        prompts,
        streams,
        choices,
        metrics=base.metrics,
        request_id=job.request_id,
        submitted=submitted,
        recording=recording,
    )
    span.submit(generation, job.metadata, prepared.submits[0].params)
    share = generation.count_in(answers, limit_error)
    num_prompt_bytes = prompt_bytes(body, prepared.submits)
    share.add(num_prompt_bytes)
    on_close = None
    if recording is not None:
        context.recordings.begin(recording)
        on_close = partial(context.recordings.add, recording)
    running = context.running.add(generation, *job.ids, owner=job.tenant.owner, on_close=on_close)
    writer = job.endpoint.writer(base, body, job.metadata, prompts)
    return _Started(generation, running, writer, share, num_prompt_bytes, _headers(job, prepared), span, on_end)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A tokenized request."""

    prompts: list[Prompt]
    submits: list[Submit]  # one message to the engine for each prompt
    grammar_request: bytes | None  # for the grammar process; all prompts share the grammar
    tokenizer_seconds: float


async def _prepare(job: _Job[Body]) -> _Prepared:
    """Tokenize the request in a thread, and make its grammar in the grammar process. Raises BadRequestError."""
    prepared = await job.context.text_threads.run(job.tenant, job.text_size, _tokenize, job)
    if prepared.grammar_request is None:
        return prepared
    grammar = await job.model.base.grammar_process.make(prepared.grammar_request, job.body, job.tenant)
    job.preamble.ignore(grammar.unenforced)
    return replace(prepared, submits=[_with_grammar(submit, grammar.text) for submit in prepared.submits])


def _with_grammar(submit: Submit, grammar: str) -> Submit:
    return msgspec.structs.replace(submit, params=msgspec.structs.replace(submit.params, grammar=grammar))


def _tokenize(job: _Job[Body]) -> _Prepared:
    start = time.monotonic()
    prompts, tokenized = _encode(job)
    seconds = time.monotonic() - start
    submits = [_make_submit(job, prompt, index, tokenized) for index, prompt in enumerate(prompts)]
    # The grammar depends on the prompt only for chats, which have a single one.
    return _Prepared(prompts, submits, encode_request(job.body, prompts[0].answer_format), seconds)


def _encode(job: _Job[Body]) -> tuple[list[Prompt], TokenizedSettings]:
    base = job.model.base
    prompts = encode_prompts(base, job.body, job.endpoint, limit=base.max_model_len)
    return prompts, tokenize_settings(base, job.body)


def encode_prompts(
    model: ServedModel, body: Body, endpoint: Endpoint[Body], *, limit: int | None = None
) -> list[Prompt]:
    """Return the tokenized prompts, truncated to `truncate_prompt_tokens`.

    Raises BadRequestError, before tokenizing if a long text that is not truncated certainly exceeds `limit`.
    """
    num_tokens = body.truncate_prompt_tokens
    prompts = endpoint.encode(model, body, limit=limit if num_tokens is None else None)
    if num_tokens is not None:
        num_tokens = max_prompt_tokens(body.max_output_tokens, model.max_model_len) if num_tokens == -1 else num_tokens
        prompts = [truncate_prompt(prompt, num_tokens, body.truncation_side or "left") for prompt in prompts]
    return prompts


def _make_submit(job: _Job[Body], prompt: Prompt, index: int, tokenized: TokenizedSettings) -> Submit:
    """Return the engine message for the prompt at `index`.

    Raises ContextLengthExceededError, or InvalidValueError for a min_tokens above max_tokens.
    """
    base, body, num_prompt_tokens = job.model.base, job.body, len(prompt.token_ids)
    settings = job.context.settings
    max_tokens = fit_max_tokens(
        body.max_output_tokens,
        num_prompt_tokens,
        base.max_model_len,
        job.endpoint.noun,
        default=settings.default_max_tokens or body.default_max_output_tokens,
        is_strict=settings.strict,
    )
    params = sampling_params(
        body,
        tokenized,
        max_tokens=max_tokens,
        seed=prompt_seed(job.seed, index),
        vocab_size=vocab_size(base),
    )
    return Submit(
        request_id=f"{job.metadata.id}-{index}",
        prompt_token_ids=prompt.token_ids,
        params=msgspec.structs.replace(params, reasoning_limit=reasoning_limit(base, body, prompt)),
        arrival=job.arrival,
        n=body.num_choices,
        priority=job.body.priority or 0,
        cache_salt=body.cache_salt or "",
        lora_name=job.model.lora_name,
        lora_fingerprint=job.model.lora_fingerprint,
        ids=job.ids,
        prompt=index,
    )


def _make_choice(job: _Job[Body], prompts: Sequence[Prompt], index: int) -> ChoiceState:
    tokenizer, body = job.model.base.tokenizer, job.body
    include_stop = bool(body.include_stop_str_in_output)
    skip_special_tokens = body.skip_special_tokens is not False
    format = prompts[index // body.num_choices].answer_format
    # Special tokens that delimit reasoning and tool calls are never skipped: the parser must see them to remove them.
    special = {} if format is None else tokenizer.special_ids_in(format.markers)
    parser = None
    if format is not None:
        hidden = (*format.content_markers, *special) if skip_special_tokens else ()
        parser = ChoiceParser(format.new_parser(hidden=hidden), f"{job.metadata.id}-{index}")
    text = ChoiceText(
        tokenizer,
        stop=body.stop or (),
        include_stop=include_stop,
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=skip_special_tokens,
        shown_ids=frozenset(special.values()),
        track_offsets=body.num_logprobs is not None,
    )
    stop_token_ids = body.stop_token_ids or ()
    return ChoiceState(index, text, include_stop=include_stop, stop_token_ids=stop_token_ids, parser=parser)


def _timings(job: _Job[Body], generation: Generation) -> RequestTimings | UnsetType:
    if not job.body.wants_timings or generation.last_end is None:
        return UNSET
    return request_timings(
        generation.last_end, arrival=job.arrival, submitted=generation.submitted, now=time.monotonic(), seed=job.seed
    )


async def _collect(job: _Job[Body], started: _Started) -> bytes:
    """Return the answer as JSON."""
    body, generation = job.body, started.generation
    accumulators = [ChoiceAccumulator(index) for index in range(len(generation.choices))]
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                accumulators[delta.index].add(delta)

    def encode() -> bytes:
        best = best_choices(
            [accumulator.join() for accumulator in accumulators], body.num_choices, body.num_returned_choices
        )
        return msgspec.json.encode(started.writer.answer(best, generation.usage, _timings(job, generation)))

    content = await _encode_output(job, started.share.num_bytes, encode)
    started.share.check()
    return content


async def _stream(job: _Job[Body], started: _Started) -> AsyncGenerator[bytes, None]:
    """Yield the answer as server-sent events, with one write for each step of the engine."""
    generation, writer, share = started.generation, started.writer, started.share
    if opening := writer.events([], generation.usage):  # sent before the first token is generated
        yield opening
    interval = job.body.stream_interval or 1
    deltas = generation.deltas()
    batches = deltas if interval == 1 else pace(deltas, interval)
    started_choices: set[int] = set()
    async with aclosing(deltas), aclosing(batches):
        async for batch in batches:
            num_bytes = sum(delta.num_bytes for delta in batch)
            num_echoed = started.num_prompt_bytes if any(each.index not in started_choices for each in batch) else 0
            started_choices.update(delta.index for delta in batch)
            write = partial(writer.events, batch, generation.usage)
            if events := await _encode_output(job, num_bytes + num_echoed, write):
                yield events
            share.sent(0 if writer.repeats_output else num_bytes)
    num_repeated = NUM_REPEATS * share.num_bytes if writer.repeats_output else 0
    share.add(num_repeated)
    share.check()
    yield await _encode_output(job, num_repeated, partial(writer.end, generation.usage, _timings(job, generation)))


async def _encode_output(job: _Job[Body], num_bytes: int, encode: Callable[[], bytes]) -> bytes:
    """Encode output of a size, in a thread if that takes long: it would block the event loop."""
    return encode() if num_bytes < LONG_BYTES else await job.context.text_threads.run(job.tenant, num_bytes, encode)
