"""A running request: merges the events of its streams and converts them to deltas of its choices."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET, UnsetType

from engine.shared.messages import FinishReason, TokenEvent
from server.engine_client.answer_budget import AnswerBudget, AnswerShare
from server.engine_client.answer_size import event_bytes
from server.engine_client.reservation import Reservation
from server.engine_client.streams import MAX_BATCH_EVENTS, RequestStream
from server.generation.choice_delta import ChoiceDelta, join_deltas
from server.generation.choice_state import ChoiceState
from server.generation.prompts import Prompt
from server.generation.timings import ChoiceEnd
from server.http.errors import APIError, ServerError
from server.metrics import Metrics
from server.recordings import Recording
from server.schemas.answers import CompletionTokensDetails, PromptTokensDetails, Usage
from server.statistics.choice_stats import ChoiceStats

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
        submitted: float,
        recording: Recording | None = None,
    ) -> None:
        """Prepare the generation, with one stream per prompt and the choices of all prompts in order.

        `submitted` is the `time.monotonic()` of the submission.
        """
        assert len(choices) % len(prompts) == 0
        self.prompts = prompts
        self.choices = choices
        self.submitted = submitted
        self.last_end: ChoiceEnd | None = None  # of the choice that ended last
        self._streams = streams
        self._num_choices = len(choices) // len(prompts)  # per prompt
        self._metrics = metrics
        self._request_id = request_id
        self._is_aborted = False
        self._recording = recording
        # `usage` may be reported in every chunk of a stream, so its constant parts are computed once.
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        formats = [prompt.answer_format for prompt in prompts]
        self._reports_reasoning = any(format is not None and format.reasoning_tags is not None for format in formats)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def count_in(self, budget: AnswerBudget, too_large: APIError) -> AnswerShare:
        """Count the events of all streams in `budget` from now on. The caller must release the share."""
        share = AnswerShare(budget, self.reservation.tenant, self._refuse, too_large)
        self.reservation.answer = share
        return share

    def _refuse(self, error: APIError) -> None:
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

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
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
        usage, choices = self.usage, self.stats
        fields: dict[str, object] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        if firsts := [stats.first_token for stats in choices if stats.first_token is not None]:
            seconds = max(stats.last_token or 0.0 for stats in choices) - min(firsts)
            num_later = sum(stats.num_output_tokens for stats in choices) - len(firsts)
            if seconds > 0:
                fields["tokens_per_second"] = round(num_later / seconds, 1)
            fields["ttft_ms"] = round(1e3 * (min(firsts) - choices[0].arrival), 1)
        return fields

    async def deltas(self) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Yield a list for each batch of events, with one delta per choice in it, until all choices have ended.

        Raises EngineDeadError, or ServerError if the engine failed on one of the choices.
        """
        try:
            async with contextlib.aclosing(_merge(self._streams)) as batches:
                async for batch in batches:
                    yield self._take_all(batch)
            if self._is_aborted:
                yield [choice.abort() for choice in self.choices if choice.finish_reason is None]
        finally:
            self.close()

    def _take_all(self, batch: Sequence[tuple[int, TokenEvent]]) -> list[ChoiceDelta]:
        """Return the deltas of a batch. Several events of one choice are joined to one delta."""
        deltas: dict[int, list[ChoiceDelta]] = {}
        for prompt_index, event in batch:
            if (delta := self._take(prompt_index, event)) is not None:
                deltas.setdefault(delta.index, []).append(delta)
        return list(map(join_deltas, deltas.values()))

    def _take(self, prompt_index: int, event: TokenEvent) -> ChoiceDelta | None:
        """Return the delta of an event, or None if it follows a stop string. Raises ServerError."""
        choice = self.choices[prompt_index * self._num_choices + event.index]
        if choice.finish_reason is not None:
            return None
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            logger.error("the engine failed: %s", event.error, extra={"request_id": self._request_id})
            raise ServerError(self._request_id)
        if event.index == 0:  # other choices of the prompt report the same
            self._take_prompt(self.prompts[prompt_index], event)
        num_bytes = event_bytes(event, self._num_choices)
        if self._recording is not None:
            self._recording.take(prompt_index, event)
        received = time.monotonic()
        delta = choice.push(event)
        delta.num_bytes = num_bytes
        if choice.stopped_by_text:
            self._streams[prompt_index].abort_choice(event.index)
        if choice.finish_reason is not None:
            self._metrics.observe_detokenizer(choice.seconds)
            times = self._streams[prompt_index].choices[event.index].times
            self.last_end = ChoiceEnd(times, choice.num_tokens, received, time.monotonic())
        return delta

    def _take_prompt(self, prompt: Prompt, event: TokenEvent) -> None:
        if event.num_cached_tokens:
            prompt.num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            prompt.logprobs = event.prompt_logprobs


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[list[tuple[int, TokenEvent]], None]:
    """Yield the events of all streams, each with its stream's index, in batches of those since the last batch.

    As in a stream, no batch has very many events.
    """
    if len(streams) == 1:
        async for batch in streams[0]:
            yield [(0, event) for event in batch]
        return
    ready: list[tuple[int, TokenEvent]] = []
    changed = asyncio.Event()

    async def pump(index: int, stream: RequestStream) -> None:
        async for batch in stream:
            ready.extend((index, event) for event in batch)
            changed.set()

    def on_end(pumps: asyncio.Future[list[None]]) -> None:
        if not pumps.cancelled():
            pumps.exception()  # retrieved even if the reader leaves, or asyncio would log it
        changed.set()

    pumps = asyncio.gather(*(pump(index, stream) for index, stream in enumerate(streams)))
    pumps.add_done_callback(on_end)
    try:
        while not pumps.done() or ready:
            await changed.wait()
            changed.clear()
            if ready:
                batch_of_all = ready.copy()
                ready.clear()
                for start in range(0, len(batch_of_all), MAX_BATCH_EVENTS):
                    yield batch_of_all[start : start + MAX_BATCH_EVENTS]
                    await asyncio.sleep(0)
        await pumps
    finally:
        pumps.cancel()
