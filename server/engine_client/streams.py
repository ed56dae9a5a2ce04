"""Streams of the engine's events, one for each prompt of a request, and the inbox that they share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from engine.shared.messages import Abort, FinishReason, LoraAdapter, Submit, ToEngine, TokenEvent
from server.engine_client.admission import Admission
from server.engine_client.answer_budget import event_bytes
from server.engine_client.reservation import Reservation
from server.http.errors import APIError, EngineUnavailableError, ServerError, clip
from server.metrics import ChoiceStats, EngineMetrics

logger = logging.getLogger(__name__)

MAX_LOST_STARTS = 2  # engines that may die while they compute a request's prompt
MAX_BATCH_EVENTS = 256  # read at a time; more would hold up other requests for too long


class ReceivedEvent(NamedTuple):
    """An event of a request that has not been read yet."""

    prompt: int  # its number, for requests with several prompts
    event: TokenEvent
    num_bytes: int  # of the answer, as an `AnswerShare` counts them


class EventInbox:
    """The events of one or more streams until one reader takes them.

    Bounded by max_tokens of each choice, and by the reservation's `answer`.
    """

    def __init__(self) -> None:
        self.num_open = 0  # choices that have not ended
        self.events: deque[ReceivedEvent] = deque()
        self.error: APIError | None = None  # that the reader gets after the events, once
        self._loop = asyncio.get_running_loop()  # asked once: it costs a system call
        self._reader: asyncio.Future[None] | None = None  # while it waits

    def wake(self) -> None:
        """Let the reader look again."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[ReceivedEvent]:
        """Return what has arrived since the last call, up to `MAX_BATCH_EVENTS`; nothing once all choices have ended.

        Raises the error that ended a stream.
        """
        if len(self.events) > MAX_BATCH_EVENTS:  # the reader is behind, and would not wait
            await asyncio.sleep(0)
        while not self.events and self.num_open and self.error is None:
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self.events:
            return [self.events.popleft() for _ in range(min(len(self.events), MAX_BATCH_EVENTS))]
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return []


class RequestStream:
    """The events of one request, as an asynchronous iterator over batches. It ends when all n choices have ended.

    A batch is what `EventInbox.take` returns. Whoever holds the stream must close it (`async with` or `close`);
    closing it early ends the request in the engine. If the engine dies, the iteration raises EngineDeadError once,
    unless the engine is restarted and the request can run again, because it has no event yet.
    """

    def __init__(
        self, message: Submit, reservation: Reservation, observer: OpenStreams, inbox: EventInbox | None = None
    ) -> None:
        """Streams with the same inbox have one reader, which tells them apart by the number of the prompt."""
        self.request_id = message.request_id
        self.reservation = reservation  # which other streams of the same request may share
        self.waiting: Submit | None = message  # until the first event
        self.choices = [
            ChoiceStats(message.arrival, message.params.max_tokens, len(message.prompt_token_ids))
            for _ in range(message.n)
        ]
        self.observer = observer
        self.num_open = message.n  # choices that have not ended
        self._prompt = message.prompt
        self.inbox = inbox or EventInbox()
        self.inbox.num_open += message.n

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if batch := await self.inbox.take():
            return [received.event for received in batch]
        raise StopAsyncIteration

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the choices that still run, in the engine too, and drop unread events. May be called again."""
        self.inbox.events.clear()
        if self.num_open:
            self.abort(FinishReason.ABORT)

    def abort_choice(self, index: int, reason: FinishReason = FinishReason.STOP) -> None:
        """End one choice, in the engine too, and drop its unread events.

        `reason` is counted in the metrics: STOP for a stop string, which only the caller can detect.
        """
        inbox, choice = self.inbox, (self._prompt, index)
        inbox.events = deque(each for each in inbox.events if (each.prompt, each.event.index) != choice)
        if not self.choices[index].has_ended:
            self.observer.send(Abort(self.request_id, index, reason))
            self._end(index, reason, time.monotonic())

    def abort(self, reason: FinishReason) -> None:
        """End the choices that still run, in the engine too. Unread events can still be read."""
        if not self.num_open:
            return
        self.observer.send(Abort(self.request_id, reason=reason))
        now = time.monotonic()
        for index, stats in enumerate(self.choices):
            if not stats.has_ended:
                self._end(index, reason, now)

    def fail(self, error: APIError) -> None:
        """Abort the request and raise `error` to the reader, after the unread events."""
        self.inbox.error = error
        self.abort(FinishReason.ERROR)
        self.inbox.wake()

    def discard(self, error: APIError) -> None:
        """Like `fail`, but drop the unread events."""
        self.inbox.events.clear()
        self.fail(error)

    def push(self, event: TokenEvent, now: float) -> None:
        """Add an event that arrived at time `now`. Events of ended choices are ignored."""
        stats, inbox = self.choices[event.index], self.inbox
        if stats.has_ended:
            return
        if stats.times is None and not stats.num_output_tokens:
            self.waiting = None
            self.observer.on_choice_start(self, stats, event)
        stats.times = event.times or stats.times
        if event.token_ids:
            self.observer.on_tokens(self, stats, event, now)
        num_bytes = event_bytes(event, len(self.choices))
        inbox.events.append(ReceivedEvent(self._prompt, event, num_bytes))
        inbox.wake()
        if event.finish_reason is not None:
            self._end(event.index, event.finish_reason, now)
        if self.reservation.answer is not None:
            self.reservation.answer.add(num_bytes)  # which may call `discard`

    def _end(self, index: int, reason: FinishReason, now: float) -> None:
        stats = self.choices[index]
        stats.has_ended = True
        self.num_open -= 1
        self.inbox.num_open -= 1
        try:
            self.observer.on_choice_end(self, stats, reason, now)
        finally:  # the capacity is free again, whatever happens
            if not self.num_open:
                self.observer.on_stream_end(self)
            self.inbox.wake()


class OpenStreams:
    """The open streams by request id. They send aborts, return capacity and record metrics."""

    def __init__(self, send: Callable[[ToEngine], None], admission: Admission, metrics: EngineMetrics) -> None:
        self.send = send
        self._admission = admission
        self._metrics = metrics
        self._streams: dict[str, RequestStream] = {}

    @property
    def num_waiting(self) -> int:
        """Number of choices of the requests without an event."""
        return sum(stream.num_open for stream in self._streams.values() if stream.waiting)

    def open(self, message: Submit, reservation: Reservation, inbox: EventInbox | None = None) -> RequestStream:
        """Send a request and return its stream, which takes over its capacity. The request id must not be in use."""
        stream = RequestStream(message, reservation, self, inbox)
        reservation.hand_over(message.n, stream)
        self._admission.expect(reservation, stream.choices)
        self.adopt(stream, message)
        return stream

    def adopt(self, stream: RequestStream, message: Submit) -> None:
        """Send the request of a stream that has no event yet, also one that another engine was to compute."""
        assert message.request_id not in self._streams
        self.send(message)
        self._streams[message.request_id] = stream
        stream.observer = self

    def start(self, request_ids: Sequence[str]) -> None:
        """Note that the engine has begun with requests."""
        for request_id in request_ids:
            if stream := self._streams.get(request_id):
                stream.reservation.start()

    def push(self, events: Sequence[TokenEvent], now: float) -> None:
        """Pass events to the streams of their requests. Events of closed streams are ignored.

        If that fails, only this request ends.
        """
        for event in events:
            if stream := self._streams.get(event.request_id):
                try:
                    stream.push(event, now)
                except Exception:
                    logger.exception("an event of request %s cannot be used", event.request_id)
                    stream.discard(ServerError())

    def find(self, request_id: str) -> RequestStream | None:
        """Return an open stream."""
        return self._streams.get(request_id)

    def discard(self, request_ids: Sequence[str], error: APIError) -> None:
        """End requests with `error`, in the engine too, and drop their unread events."""
        for request_id in request_ids:
            if stream := self._streams.get(request_id):
                stream.discard(error)

    def fail(self, error: APIError) -> None:
        """End all requests with `error`, in the engine too."""
        for stream in list(self._streams.values()):
            stream.reservation.fail(error)

    def lose_engine(self, error: APIError) -> None:
        """End the streams that have had events with `error`. Those without wait for the next engine.

        A request that engines keep dying of ends, too, so that it does not end them all.
        """
        for reservation in {stream.reservation for stream in self._streams.values()}:
            reservation.lose_start()
        for stream in list(self._streams.values()):
            if not stream.waiting or stream.reservation.num_lost_starts >= MAX_LOST_STARTS:
                stream.fail(error)

    def submit_again(self, adapters: Mapping[str, LoraAdapter]) -> None:
        """Send the requests without an event to a restarted engine, which has `adapters`; fail those it cannot run."""
        for stream in list(self._streams.values()):
            if (message := stream.waiting) is None:
                continue
            adapter = adapters.get(message.lora_name)
            if message.lora_name and (adapter is None or adapter.fingerprint != message.lora_fingerprint):
                lost = f"The LoRA adapter '{clip(message.lora_name)}' could not be loaded again"
                stream.fail(EngineUnavailableError(f"{lost} after a restart of the engine."))
            else:
                self.send(message)

    def on_choice_start(self, stream: RequestStream, stats: ChoiceStats, event: TokenEvent) -> None:
        """Handle the first event of a choice."""
        stream.reservation.start()
        stream.reservation.has_output = True
        self._admission.start_choice(stream.reservation, stats, event.num_cached_tokens)

    def on_tokens(self, stream: RequestStream, stats: ChoiceStats, event: TokenEvent, now: float) -> None:
        """Count the tokens of an event that arrived at time `now`."""
        account = stream.reservation.tenant.account
        account.count_tokens(output=len(event.token_ids))
        stats.num_output_tokens += len(event.token_ids)
        if stats.last_token is None:
            self._metrics.first_token.observe(now - stats.arrival)
            stats.first_token, stats.num_cached_tokens = now, event.num_cached_tokens
            if event.index == 0:
                account.usage.num_cached_tokens += event.num_cached_tokens
        else:
            self._metrics.inter_token.observe(now - stats.last_token)
        stats.last_token = now

    def on_choice_end(self, stream: RequestStream, stats: ChoiceStats, reason: FinishReason, now: float) -> None:
        """Return the capacity of a choice, and record how it went."""
        self._admission.end_choice(stream.reservation, stats)
        self._metrics.observe_choice(stats, reason, now)

    def on_stream_end(self, stream: RequestStream) -> None:
        """Handle the end of the last choice."""
        del self._streams[stream.request_id]
        stream.reservation.end_stream(stream)
        self._metrics.observe_request(stream.choices)
