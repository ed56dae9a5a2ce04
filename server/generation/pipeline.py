"""The way from a request to its answer: validate, reserve, encode, submit, then stream or collect."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from server.context import RequestSteps, get_context
from server.generation.choice import ChoiceAccumulator, Pacer, best_choices
from server.generation.endpoint import AnswerMetadata, Body, Endpoint
from server.generation.generation import request_timings
from server.generation.job import Job, prepare, submit
from server.generation.parameters import LOGPROB_FIELDS, TOKEN_ID_FIELDS, check_token_ids, resolve_num_logprobs
from server.generation.preamble import begin, find_generating_model, next_seed
from server.generation.prompts import vocab_size
from server.http.bodies import TEXT_SIZE
from server.http.request_middleware import LOG_FIELDS
from server.http.responses import KEEP_ALIVE_SECONDS, SERVER_SENT_EVENTS, AnswerResponse, EventStream, StreamFormat
from server.schemas.answers import RequestTimings
from server.tenants import TENANT, Tenant

# A stream's status is held back until the engine has begun with the request, so that one that has to make room for
# another gets a real 429, which clients retry. After this time it is sent, since idle connections need comments.
MAX_HELD_SECONDS = KEEP_ALIVE_SECONDS

LONG_BYTES = 1 << 18  # of output; encoding it takes some milliseconds
NUM_REPEATS = 4  # of the output in the last events of a stream that repeats it


async def respond(
    request: Request,
    body: Body,
    endpoint: Endpoint[Body],
    *,
    stream_format: StreamFormat = SERVER_SENT_EVENTS,
    on_end: Callable[[], None] | None = None,
) -> Response:
    """Answer a request, as JSON or as a stream. `on_end` is called when the generation has ended.

    Raises APIError for errors before the first byte of the answer.
    """
    job = await start(request, body, endpoint, on_end)
    request.scope["state"][LOG_FIELDS] = job.generation.log_fields
    try:
        if body.stream:
            await job.reservation.wait_for_start(MAX_HELD_SECONDS)
        else:
            content = await collect(job)
    except BaseException as error:
        job.steps.fail(error)
        job.end()
        raise
    if not body.stream:
        job.end(is_answered=True)
        return AnswerResponse(content, job.share, job.headers)
    return EventStream(
        stream(job),
        on_close=job.end,
        on_error=job.failure,
        headers=job.headers,
        request_id=job.request_id,
        format=stream_format,
    )


async def validate(
    request: Request, body: Body, endpoint: Endpoint[Body], steps: RequestSteps, *, default_seed: int | None = None
) -> Job[Body]:
    """Make all checks that need no tokenizer.

    A request without a seed gets `default_seed`, or a seed that is chosen here. Raises BadRequestError,
    ModelNotFoundError or EngineUnavailableError.
    """
    arrival, context, state = time.monotonic(), get_context(request), request.scope["state"]
    tenant: Tenant = state[TENANT]
    fields = body.model_fields_set
    model = find_generating_model(context, body.model, tenant)
    base, is_model_missing = model.base, body.model is None
    preamble = begin(request, body, is_model_missing=is_model_missing, ignored=endpoint.ignored_fields(base, body))
    body.check()
    info = base.client.ready_info()
    if not TOKEN_ID_FIELDS.isdisjoint(fields):
        check_token_ids(body, vocab_size(base), base.config.eos_token_ids)
    if not LOGPROB_FIELDS.isdisjoint(fields):
        body = resolve_num_logprobs(body, context.settings.max_logprobs, vocab_size(base))
    if base.default_sampling.values:
        body = base.default_sampling.apply(body)
    seed = default_seed if body.seed in (None, -1) else body.seed  # clients of other servers send -1 for a random one
    metadata = AnswerMetadata(
        id=f"{endpoint.id_prefix}{secrets.token_hex(16)}",
        created=int(time.time()),
        model=model.name,
        system_fingerprint=model.system_fingerprint(info),
    )
    request_id: str = state["request_id"]
    return Job(
        context=context,
        endpoint=endpoint,
        body=body,
        requested=body.requested(),
        fields=fields | base.default_sampling.values.keys(),
        model=model,
        info=info,
        metadata=metadata,
        ids=(metadata.id, request_id, *(() if body.request_id is None else (body.request_id,))),
        seed=await next_seed(context) if seed is None else seed,
        arrival=arrival,
        request_id=request_id,
        preamble=preamble,
        tenant=tenant,
        text_size=state.get(TEXT_SIZE, 0),
        steps=steps,
    )


async def start(request: Request, body: Body, endpoint: Endpoint[Body], on_end: Callable[[], None] | None) -> Job[Body]:
    """Validate a request, reserve capacity, tokenize the request and submit it to the engine. Raises APIError.

    Capacity is reserved first: a request that exceeds it must be refused before time is spent on tokenizing it.
    """
    steps = RequestSteps()
    for step in get_context(request).steps:
        step(request, body, endpoint, steps)
    try:
        job = await validate(request, body, endpoint, steps)
        client, requested = job.model.base.client, job.requested
        param = "n" if requested.num_choices > 1 else endpoint.noun
        count = requested.num_prompts * requested.num_choices
        reservation = await client.admit(count, param=param, tenant=job.tenant, queue_timeout=body.queue_timeout)
        try:
            submits, tokenizer_seconds = await prepare(job)
            job.model.base.metrics.observe_tokenizer(tokenizer_seconds)
            submit(job, submits, reservation)
        finally:
            reservation.release()
        if on_end is not None:
            steps.on_end.append(on_end)
        return job
    except BaseException as error:
        steps.fail(error)
        steps.end()
        raise


def _timings(job: Job[Body]) -> RequestTimings | UnsetType:
    """Return the timings of a request that asks for them."""
    if (end := job.generation.last_end) is None:
        return UNSET
    return request_timings(end, arrival=job.arrival, submitted=job.submitted, now=time.monotonic(), seed=job.seed)


async def collect(job: Job[Body]) -> bytes:
    """Return the answer as JSON."""
    requested, generation = job.requested, job.generation
    accumulators = [ChoiceAccumulator(index) for index in range(len(generation.choices))]
    while (batch := await generation.next()) is not None:
        for delta in batch:
            accumulators[delta.index].add(delta)

    def encode() -> bytes:
        choices = [accumulator.join() for accumulator in accumulators]
        best = best_choices(choices, requested.num_choices, requested.num_returned_choices)
        timings = _timings(job) if job.requested.wants_timings else UNSET
        return msgspec.json.encode(job.writer.answer(best, generation.usage(), timings))

    content = await _encode_output(job, job.share.num_bytes, encode)
    job.share.check()
    return content


async def stream(job: Job[Body]) -> AsyncGenerator[bytes, None]:
    """Yield the answer as server-sent events, with one write for each step of the engine."""
    generation, writer, share = job.generation, job.writer, job.share
    if opening := writer.events([], generation.usage):  # sent before the first token is generated
        yield opening
    interval = job.body.stream_interval or 1
    next_batch = generation.next if interval == 1 else Pacer(generation.next, interval).next
    started: set[int] = set()  # choices with the prompts' part of the answer
    while (batch := await next_batch()) is not None:
        num_bytes = num_written = sum([delta.num_bytes for delta in batch])
        if job.num_prompt_bytes and not started.issuperset([delta.index for delta in batch]):
            num_written += job.num_prompt_bytes
            started.update([delta.index for delta in batch])
        if num_written < LONG_BYTES:
            events = writer.events(batch, generation.usage)
        else:
            events = await _encode_output(job, num_written, partial(writer.events, batch, generation.usage))
        if events:
            yield events
        if not writer.repeats_output:
            share.subtract(num_bytes)
    timings = _timings(job) if job.requested.wants_timings else UNSET
    num_repeated = NUM_REPEATS * share.num_bytes if writer.repeats_output else 0
    share.add(num_repeated)
    if share.error is not None:
        raise share.error
    if num_repeated < LONG_BYTES:
        yield writer.end(generation.usage(), timings)
    else:
        yield await _encode_output(job, num_repeated, partial(writer.end, generation.usage(), timings))


async def _encode_output(job: Job[Body], num_bytes: int, encode: Callable[[], bytes]) -> bytes:
    """Encode output of a size, in a thread if that takes long: it would block the event loop."""
    return encode() if num_bytes < LONG_BYTES else await job.context.text_threads.run(job.tenant, num_bytes, encode)
