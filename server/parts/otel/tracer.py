"""Makes spans of generation requests with OpenTelemetry's SDK, which sends them in batches, in a thread of its own.

Imported only with `--otlp-endpoint`: the packages are those of `lightwell[otel]`. The SDK's own `OTEL_*` variables set
everything but the endpoint: headers, certificates, timeouts, sampler, sizes of queue and batches, resource attributes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import msgspec
import requests
from fastapi import Request
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from engine.shared.messages import FinishReason, RequestTimes, SamplingParams, Submit
from server.context import RequestSteps, get_context
from server.generation.endpoint import Endpoint
from server.generation.generation import Generation, stage_spans
from server.generation.job import Job
from server.http.errors import APIError, clip
from server.metrics import ChoiceStats
from server.schemas.generation_request import GenerationRequest
from server.tenants import get_tenant

AttributeValue = str | bool | int | float | Sequence[str]

logger = logging.getLogger(__name__)

PATH = "/v1/traces"  # of an OTLP receiver
UNNAMED_SERVICE = "unknown_service"  # how the SDK's default name of a service begins
CLOSE_SECONDS = 1.0  # for the last spans at shutdown; the supervisor waits little longer
REPEAT_SECONDS = 600.0  # until a message of the SDK is logged again
MAX_CHOICES = 16  # of a request, whose stages are shown


@dataclass(frozen=True, slots=True)
class Span:
    """What a span says. Times are `time.monotonic()`."""

    name: str
    start: float
    end: float
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


class Tracer:
    """Makes spans of what has happened."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: URL of the receiver, with or without `PATH`. Raises ValueError for invalid `OTEL_*` variables."""
        sdk_logger = logging.getLogger("opentelemetry")
        sdk_logger.handlers, sdk_logger.propagate = [_SeldomHandler()], False
        url = endpoint.rstrip("/").removesuffix(PATH) + PATH
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, session=_session())))
        self._tracer = self._provider.get_tracer("lightwell", version("lightwell"))
        self._propagator = TraceContextTextMapPropagator()
        logger.info("spans are sent to %s", url)

    def record(self, whole: Span, parts: Iterable[Span], headers: Headers, *, is_error: bool) -> None:
        """Make a server span, and spans of its parts.

        It belongs to the trace that the request's headers name, which also say whether it is sampled.
        """
        offset = time.time_ns() - time.monotonic_ns()
        parents = headers.getlist("traceparent")  # if there are several, none is valid
        carrier = {"traceparent": parents, "tracestate": headers.getlist("tracestate")} if len(parents) == 1 else {}
        parent = self._propagator.extract(carrier, Context())
        span = self._begin(whole, parent, SpanKind.SERVER, offset)
        if span.is_recording():
            context = set_span_in_context(span, Context())
            for part in parts:
                self._begin(part, context, SpanKind.INTERNAL, offset).end(_nanoseconds(part.end, offset))
        if is_error:
            span.set_status(StatusCode.ERROR)
        span.end(_nanoseconds(whole.end, offset))

    def _begin(self, span: Span, parent: Context, kind: SpanKind, offset: int) -> trace.Span:
        started = _nanoseconds(span.start, offset)
        return self._tracer.start_span(span.name, parent, kind, span.attributes, start_time=started)

    async def start(self) -> None:
        """Do nothing: spans are sent from the first one on."""

    async def close(self) -> None:
        """Send the last spans, for at most `CLOSE_SECONDS`."""
        closed, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # it took longer, and the loop is closed
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=shut_down, daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), CLOSE_SECONDS)


class _SeldomHandler(logging.Handler):
    """Logs each kind of message once in `REPEAT_SECONDS`: a receiver that is down fails again with every batch."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock = clock
        self._logged: dict[str, float] = {}  # text without arguments -> time

    def emit(self, record: logging.LogRecord) -> None:
        kind, now = str(record.msg), self._clock()
        if now - self._logged.get(kind, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._logged[kind] = now
            logger.log(record.levelno, "OpenTelemetry: %s", record.getMessage(), exc_info=record.exc_info)


def _resource() -> Resource:
    """Return what describes this server, for which `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` are read."""
    resource = Resource({SERVICE_VERSION: version("lightwell")}).merge(Resource.create())
    if str(resource.attributes[SERVICE_NAME]).startswith(UNNAMED_SERVICE):
        resource = resource.merge(Resource({SERVICE_NAME: "lightwell"}))
    return resource


def _session() -> requests.Session:
    """Return a session that does not read the bodies of answers, which may be endless. Only their status counts."""
    session = requests.Session()
    session.stream = True
    session.hooks["response"] = [lambda response, **_: response.close()]
    return session


def _nanoseconds(seconds: float, offset: int) -> int:
    return round(1e9 * seconds) + offset


class RequestSpan:
    """Collects what becomes a span when a request ends."""

    def __init__(self, tracer: Tracer, request: Request, body: GenerationRequest, operation: str) -> None:
        """Begin with the arrival of a request. `operation`: `gen_ai.operation.name`."""
        self._tracer: Tracer | None = tracer
        self._arrival = time.monotonic()
        self._headers = request.headers
        self._name = operation
        self._is_stream = bool(body.stream)
        self._generation: Generation | None = None
        self._error: BaseException | None = None
        self._submitted = 0.0
        self._attributes = _request_attributes(request, body, operation)

    def submit(self, job: Job[Any], submits: Sequence[Submit]) -> None:
        """Note that the request is in the engine."""
        metadata = job.metadata
        self._generation = job.generation
        self._submitted = job.submitted
        self._name += f" {metadata.model}"
        self._attributes |= _setting_attributes(submits[0].params)
        self._attributes |= {"gen_ai.response.id": metadata.id, "gen_ai.response.model": metadata.model}

    def fail(self, error: BaseException) -> None:
        """Note the error that ends the request. That its client has left, which cancels it, is none."""
        if isinstance(error, Exception) and not isinstance(error, ClientDisconnect):
            self._error = error

    def end(self) -> None:
        """Make the span, unless that is done."""
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        start, end = self._arrival, time.monotonic()
        parts: Iterable[Span] = ()
        if (generation := self._generation) is not None and generation.stats:
            times = [
                _times(generation, stats, choice.finish_reason is not None, self._submitted, end)
                for stats, choice in zip(generation.stats, generation.choices, strict=True)
            ]
            start = times[0].arrival
            parts = _stages(times, len(generation.choices) // len(generation.prompts), end)
            self._attributes |= _response_attributes(generation, times, self._error, self._is_stream)
        if self._error is not None:
            error = self._error
            kind = (error.code or error.type) if isinstance(error, APIError) else type(error).__name__
            self._attributes["error.type"] = kind
        whole = Span(self._name, start, end, self._attributes)
        tracer.record(whole, parts, self._headers, is_error=self._error is not None)


def begin_span(
    tracer: Tracer, request: Request, body: GenerationRequest, endpoint: Endpoint[Any], steps: RequestSteps
) -> None:
    """Make a span of a request."""
    span = RequestSpan(tracer, request, body, endpoint.operation)
    steps.on_submitted.append(span.submit)
    steps.on_failure.append(span.fail)
    steps.on_end.append(span.end)


def _request_attributes(request: Request, body: GenerationRequest, operation: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "lightwell",
        "gen_ai.request.stream": bool(body.stream),
        "http.route": request.scope["route"].path,
        "lightwell.request_id": request.state.request_id,
    }
    if body.model is not None:
        attributes["gen_ai.request.model"] = clip(body.model)
    if body.n is not None and body.n > 1:
        attributes["gen_ai.request.choice.count"] = body.n
    if get_context(request).settings.needs_key:  # otherwise, tenants are addresses
        attributes["lightwell.key"] = get_tenant(request).name
    return attributes


def _setting_attributes(params: SamplingParams) -> dict[str, AttributeValue]:
    """Return the settings in effect, those that the request leaves to the server included."""
    top_k: dict[str, AttributeValue] = {"gen_ai.request.top_k": params.top_k} if params.top_k else {}
    return top_k | {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
    }


def _response_attributes(
    generation: Generation, times: Sequence[RequestTimes], error: BaseException | None, is_stream: bool
) -> dict[str, AttributeValue]:
    usage, unfinished = generation.usage(), FinishReason.ABORT if error is None else FinishReason.ERROR
    attributes: dict[str, AttributeValue] = {
        "gen_ai.response.finish_reasons": [choice.finish_reason or unfinished.value for choice in generation.choices],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens_details.cached_tokens,
        "lightwell.num_ahead": times[0].num_ahead,
        "lightwell.num_preemptions": sum(each.num_preemptions for each in times),
    }
    if usage.completion_tokens_details is not msgspec.UNSET:
        attributes["gen_ai.usage.reasoning.output_tokens"] = usage.completion_tokens_details.reasoning_tokens
    if firsts := [each.first_token for each in times if each.first_token is not None]:
        attributes["gen_ai.server.time_to_first_token"] = min(firsts) - times[0].arrival  # the name of a metric
    if is_stream and (received := [stats.first_token for stats in generation.stats if stats.first_token is not None]):
        attributes["gen_ai.response.time_to_first_chunk"] = min(received) - times[0].arrival
    return attributes


def _times(
    generation: Generation, stats: ChoiceStats, has_finished: bool, submitted: float, end: float
) -> RequestTimes:
    """Return the times of a choice, which the engine reports with its first and last events. It ends by `end`."""
    times = stats.times or RequestTimes(
        arrival=stats.arrival, queued=submitted, scheduled=generation.reservation.started, first_token=stats.first_token
    )
    finished = times.finished or (stats.last_token if has_finished else None)  # a stop string ends it in this process
    return msgspec.structs.replace(times, finished=min(finished or end, end))


def _stages(times: Sequence[RequestTimes], num_choices: int, end: float) -> Iterator[Span]:
    """Yield the stages of the choices, of which a prompt has `num_choices`, and the writing of the end of the answer.

    The stages of the choice that ends last fill the time from its arrival to `end`.
    """
    spans = [Span("writing", max(each.finished or end for each in times), end)]
    for number, each in enumerate(times[:MAX_CHOICES]):
        name: dict[str, AttributeValue] = {}
        if len(times) > 1:
            name = {"lightwell.prompt": number // num_choices, "lightwell.choice": number % num_choices}
        spans += [Span(*stage, name) for stage in stage_spans(each, end)]
    return (span for span in spans if span.end > span.start)
