"""A running request: converts the events of its streams to deltas of its choices, and says how long its stages took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from engine.shared.messages import FinishReason, RequestTimes, TokenEvent
from server.engine_client.reservation import Reservation
from server.engine_client.streams import ReceivedEvent, RequestStream
from server.generation.choice import ChoiceDelta, ChoiceState, join_deltas
from server.generation.prompts import Prompt
from server.http.errors import APIError, ServerError
from server.metrics import ChoiceStats, Metrics
from server.schemas.answers import CompletionTokensDetails, PromptTokensDetails, RequestTimings, StageSeconds, Usage


class Stage(NamedTuple):
    """A part of a choice's time, from and to times of `time.monotonic()`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The end of the choice that ended last. Times are `time.monotonic()`."""

    times: RequestTimes | None  # from the engine; without `finished` if the server found a stop string
    num_output_tokens: int
    received: float  # when the last event arrived
    detokenized: float  # when its text was ready


def request_timings(end: ChoiceEnd, *, arrival: float, submitted: float, seed: int, now: float) -> RequestTimings:
    """Return the timings of a request whose answer is complete except for them.

    `arrival`, `submitted` and `now` are `time.monotonic()`: it arrived, was sent to the engine, and is answered.
    """
    times = end.times or RequestTimes(arrival=arrival, queued=submitted)
    finished = times.finished or end.received
    scheduled = times.scheduled or finished
    first_token = times.first_token or finished
    preempted_before, preempted_after = times.preempted(finished)
    return RequestTimings(
        seed=seed,
        wall_s=now - arrival,
        seconds=StageSeconds(
            tokenizing=submitted - arrival,
            queue=scheduled - submitted,
            prefill=first_token - scheduled - preempted_before,
            decode=finished - first_token - preempted_after,
            preempted=preempted_before + preempted_after,
            detokenizing=end.detokenized - end.received,
            writing=(end.received - finished) + (now - end.detokenized),
        ),
        num_ahead=times.num_ahead,
        num_cached_tokens=times.num_cached_tokens,
        num_computed_tokens=times.num_prompt_tokens - times.num_cached_tokens,
        num_chunks=times.num_chunks,
        num_output_tokens=end.num_output_tokens,
        num_preemptions=times.num_preemptions,
    )


def stage_spans(times: RequestTimes, now: float) -> list[Stage]:
    """Return the stages of a choice until `now`, or until its end. Each starts where the one before ends.

    Their names are the fields of `Stages`. Stages after a preemption come again.
    """
    end = now if times.finished is None else times.finished
    start = end if times.scheduled is None else times.scheduled
    spans = [Stage("tokenizing", times.arrival, times.queued), Stage("queue", times.queued, start)]
    for preempted, resumed in zip_longest(times.preemptions, times.resumptions, fillvalue=end):
        spans += [*_computing(start, preempted, times.first_token), Stage("preempted", preempted, resumed)]
        start = resumed
    return [*spans, *_computing(start, end, times.first_token)]


def _computing(start: float, end: float, first_token: float | None) -> list[Stage]:
    """Return the stages between two times in which a choice was not preempted."""
    middle = end if first_token is None else min(max(start, first_token), end)
    return [Stage("prefill", start, middle), Stage("decode", middle, end)]


logger = logging.getLogger(__name__)


class Generation:
    """The choices of one request. Choice j of prompt i has index i * n + j in the answer.

    Its owner must close it, which ends the choices that still run.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        streams: Sequence[RequestStream],
        choices: Sequence[ChoiceState],
        *,
        metrics: Metrics,
        request_id: str,
        on_event: Sequence[Callable[[int, TokenEvent], None]] = (),
    ) -> None:
        """Prepare the generation, with one stream per prompt, which share an inbox, and the choices of all prompts."""
        assert len(choices) % len(prompts) == 0
        self.prompts = prompts
        self.choices = choices
        self.last_end: ChoiceEnd | None = None  # of the choice that ended last
        self._streams = streams
        self._inbox = streams[0].inbox
        self._num_choices = len(choices) // len(prompts)  # per prompt
        self._metrics = metrics
        self._request_id = request_id
        self._is_aborted = False
        self._on_event = on_event
        # `usage` may be reported in every chunk of a stream, so its constant parts are computed once.
        self._num_prompt_tokens = sum([len(prompt.token_ids) for prompt in prompts])
        formats = [prompt.answer_format for prompt in prompts]
        self._reports_reasoning = any([each is not None and each.reasoning_tags is not None for each in formats])

    def close(self) -> None:
        for stream in self._streams:
            if stream.num_open or stream.inbox.events:
                stream.close()

    def refuse(self, error: APIError) -> None:
        """End the choices with an error, and drop what has not been read."""
        for stream in self._streams:
            stream.discard(error)

    def abort(self) -> bool:
        """End the choices that still run, with the finish reason `abort`. Return whether there were any."""
        if not any(stream.num_open for stream in self._streams):
            return False
        self._is_aborted = True
        for stream in self._streams:
            stream.abort(FinishReason.ABORT)
        return True

    @property
    def reservation(self) -> Reservation:
        """The capacity that the choices hold."""
        return self._streams[0].reservation

    def usage(self) -> Usage:
        """Return the token counts so far."""
        num_prompt_tokens = self._num_prompt_tokens
        num_output_tokens = sum([choice.num_tokens for choice in self.choices])
        details: CompletionTokensDetails | UnsetType = UNSET
        if self._reports_reasoning:
            details = CompletionTokensDetails(sum(choice.num_reasoning_tokens for choice in self.choices))
        return Usage(
            num_prompt_tokens,
            num_output_tokens,
            num_prompt_tokens + num_output_tokens,
            PromptTokensDetails(sum([prompt.num_cached_tokens for prompt in self.prompts])),
            details,
        )

    @property
    def stats(self) -> list[ChoiceStats]:
        """Statistics of the choices, in their order."""
        return [stats for stream in self._streams for stats in stream.choices]

    def log_fields(self) -> dict[str, object]:
        """Return token counts and speeds so far, for the log. Speed is that of the tokens after the first ones."""
        usage, choices = self.usage(), [stats for stream in self._streams for stats in stream.choices]
        fields: dict[str, object] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        if firsts := [stats.first_token for stats in choices if stats.first_token is not None]:
            seconds = max([stats.last_token or 0.0 for stats in choices]) - min(firsts)
            num_later = sum([stats.num_output_tokens for stats in choices]) - len(firsts)
            if seconds > 0:
                fields["tokens_per_second"] = round(num_later / seconds, 1)
            fields["ttft_ms"] = round(1e3 * (min(firsts) - choices[0].arrival), 1)
        return fields

    async def next(self) -> list[ChoiceDelta] | None:
        """Return a delta for each choice that has new output, or None once all choices have ended.

        Raises EngineDeadError, or ServerError if the engine failed on one of the choices.
        """
        events = await self._inbox.take()
        if not events:
            unfinished = [choice for choice in self.choices if choice.finish_reason is None] if self._is_aborted else []
            return [choice.abort() for choice in unfinished] or None
        deltas: dict[int, list[ChoiceDelta]] = {}
        for event in events:
            if (delta := self._take(event)) is not None:
                deltas.setdefault(delta.index, []).append(delta)
        return [each[0] if len(each) == 1 else join_deltas(each) for each in deltas.values()]

    def _take(self, received: ReceivedEvent) -> ChoiceDelta | None:
        """Return the delta of an event, or None if it follows a stop string. Raises ServerError."""
        number, event, num_bytes = received
        choice = self.choices[number * self._num_choices + event.index]
        if choice.finish_reason is not None:
            return None
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            logger.error("the engine failed: %s", event.error, extra={"request_id": self._request_id})
            raise ServerError(self._request_id)
        if event.index == 0:  # other choices of the prompt report the same
            prompt = self.prompts[number]
            prompt.num_cached_tokens = event.num_cached_tokens or prompt.num_cached_tokens
            prompt.logprobs = prompt.logprobs if event.prompt_logprobs is None else event.prompt_logprobs
        for step in self._on_event:
            step(number, event)
        received_at = time.monotonic()
        delta = choice.push(event)
        delta.num_bytes = num_bytes
        if choice.finish_reason is not None:
            stream = self._streams[number]
            if delta.stop_string is not None:
                stream.abort_choice(event.index)
            self._metrics.observe_detokenizer(choice.seconds)
            times = stream.choices[event.index].times
            self.last_end = ChoiceEnd(times, choice.num_tokens, received_at, time.monotonic())
        return delta
