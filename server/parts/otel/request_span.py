"""The span of a generation request: its attributes, and the stages of its choices as children.

Names are those of OpenTelemetry's semantic conventions for generative AI; those that begin with `lightwell.` are our
own. No text of prompts and answers is in them, and none that may quote it: no stop strings, no messages of errors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from engine.shared.messages import FinishReason, RequestTimes, SamplingParams, Submit
from server.context import RequestSteps, get_context
from server.generation.endpoint import Endpoint
from server.generation.generation import Generation, stage_spans
from server.generation.job import Job
from server.http.errors import APIError, clip
from server.metrics import ChoiceStats
from server.parts.otel.tracer import AttributeValue, ChildSpan, Tracer
from server.schemas.generation_request import GenerationRequest
from server.tenants import get_tenant

MAX_CHOICES = 16  # of a request, whose stages are shown


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
        children: list[ChildSpan] = []
        if (generation := self._generation) is not None and generation.stats:
            times = [
                _times(generation, stats, choice.finish_reason is not None, self._submitted, end)
                for stats, choice in zip(generation.stats, generation.choices, strict=True)
            ]
            start = times[0].arrival
            children = list(_stages(times, len(generation.choices) // len(generation.prompts), end))
            self._attributes |= _response_attributes(generation, times, self._error, self._is_stream)
        if self._error is not None:
            self._attributes["error.type"] = _error_type(self._error)
        tracer.record(
            self._name,
            self._headers,
            self._attributes,
            children,
            start=start,
            end=end,
            is_error=self._error is not None,
        )


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


def _stages(times: Sequence[RequestTimes], num_choices: int, end: float) -> Iterator[ChildSpan]:
    """Yield the stages of the choices, of which a prompt has `num_choices`, and the writing of the end of the answer.

    The stages of the choice that ends last fill the time from its arrival to `end`.
    """
    spans = [ChildSpan("writing", max(each.finished or end for each in times), end)]
    for number, each in enumerate(times[:MAX_CHOICES]):
        name: dict[str, AttributeValue] = {}
        if len(times) > 1:
            name = {"lightwell.prompt": number // num_choices, "lightwell.choice": number % num_choices}
        spans += [ChildSpan(*stage, name) for stage in stage_spans(each, end)]
    return (span for span in spans if span.end > span.start)


def _error_type(error: BaseException) -> str:
    return (error.code or error.type) if isinstance(error, APIError) else type(error).__name__
