"""The API process's end of the line to the engine: requests go out, streams of their events come back.

One receive task decodes each message once, which is once per step and not per token, and hands its events to the
streams of their requests. Four books are kept here and nowhere else: which choices hold a slot, which LoRA adapters
are loaded, whether the engine still lives, and when it last moved.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from engine.shared.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    AdapterDone,
    Adapters,
    EngineInfo,
    EngineStats,
    FinishReason,
    FromEngine,
    Hello,
    LoraAdapter,
    Outputs,
    Ready,
    RequestTimes,
    Submit,
    ToEngine,
    TokenEvent,
    Vocabulary,
)
from server.engine_client.adapters import AdapterBook
from server.engine_client.throughput import Throughput
from server.http.errors import (
    APIError,
    EngineDeadError,
    EngineUnavailableError,
    InvalidValueError,
    QueueFullError,
)

if TYPE_CHECKING:
    from server.metrics import Metrics

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3  # beyond the longest step
SHUTTING_DOWN = "The server is shutting down. Please retry later."
REFILL_SECONDS = 0.02  # between looks for free slots


class EngineClient:
    """One per API process. Everything but `__init__` must be called on the event loop that called `start`."""

    def __init__(
        self,
        address: str,
        *,
        max_queued_requests: int,
        step_timeout: float,
        engine_pid: int | None = None,
        metrics: Metrics | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """With `engine_pid` the engine's death is noticed while it still loads; otherwise only once it was ready."""
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.dead_reason: str | None = None
        self.num_in_flight = 0
        self.on_death = asyncio.Event()
        self.on_drain = asyncio.Event()
        self._address = address
        self._max_queued_requests = max_queued_requests
        self._heartbeat_limit = step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        self._last_heartbeat = 0.0
        self._engine_pid = engine_pid
        self._metrics = metrics
        self._vocabulary = vocabulary  # None: no request has a grammar
        if metrics is not None:
            metrics.set_stats_source(lambda: self.stats)
        self._streams: dict[str, RequestStream] = {}  # request_id -> stream
        self._adapters = AdapterBook(self._send)
        self._throughput = Throughput()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._tasks: list[asyncio.Task[None]] = []
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._pidfd: int | None = None

    async def start(self) -> None:
        """Connects, whether the engine is there yet or not, and asks it to say when it is ready."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.connect(self._address)
        self._send(Hello())
        if self._vocabulary is not None:
            self._send(self._vocabulary)
        if self._engine_pid is not None:
            self._watch_process(self._engine_pid)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch_heartbeat())]

    async def close(self) -> None:
        """Ends the tasks and the streams that are still open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self.fail_streams(EngineUnavailableError("The server has stopped.", close=True))
        self._close_pidfd()
        if self._socket is not None and self._context is not None:
            self._socket.close()
            self._context.term()
        self._socket = self._context = None

    @property
    def is_ready(self) -> bool:
        """The engine has loaded its model, and is alive as far as we know."""
        return self.info is not None and self.dead_reason is None

    @property
    def is_alive(self) -> bool:
        """The engine still loads, or its step loop moved lately."""
        return self.dead_reason is None and (self.info is None or not self._is_stale())

    @property
    def is_healthy(self) -> bool:
        """The engine is ready and its step loop moved lately."""
        return self.is_ready and not self._is_stale()

    def ready_info(self) -> EngineInfo:
        """What the engine is; EngineUnavailableError if it is not ready, or no longer."""
        if self.dead_reason is not None:
            raise EngineUnavailableError("The engine has stopped. Please retry later.", close=True)
        if self.info is None:
            raise EngineUnavailableError("The model is still being loaded. Please retry later.")
        return self.info

    def check_open(self) -> None:
        """Raises EngineUnavailableError where no new work is accepted."""
        if self.draining:
            raise EngineUnavailableError(SHUTTING_DOWN, close=True)
        self.ready_info()

    @property
    def draining(self) -> bool:
        return self.on_drain.is_set()

    @property
    def max_in_flight(self) -> int:
        """How many choices may be in flight at a time: what the engine runs, and what may wait."""
        return self.ready_info().max_num_seqs + self._max_queued_requests

    def reserve(self, count: int, *, param: str = "n") -> Reservation:
        """Takes `count` slots, one for each choice (n x prompts), or none. `param` is what an error says is too much.

        To be called before anything costly is done for the request. Raises EngineUnavailableError, QueueFullError, or
        InvalidValueError where the request alone is more than the server can hold.
        """
        try:
            self._admit(count, param)
        except APIError:
            if self._metrics is not None:
                self._metrics.count_rejection(self._rejection_reason(count))
            raise
        if self.num_in_flight == 0:
            self._throughput.start(time.monotonic())
        self.num_in_flight += count
        return Reservation(self, count)

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Waits for more slots for a request that has been admitted already. Takes up to `count`.

        Returns how many. Raises EngineUnavailableError.
        """
        while (num_free := min(count, self.max_in_flight - self.num_in_flight)) <= 0:
            self.ready_info()
            await asyncio.sleep(REFILL_SECONDS)
        self.num_in_flight += num_free
        reservation.count += num_free
        return num_free

    def _admit(self, count: int, param: str) -> None:
        self.check_open()
        if count > self.max_in_flight:
            message = (
                f"The request asks for {count} choices (n for each prompt), "
                f"but this server holds {self.max_in_flight} at a time."
            )
            raise InvalidValueError(message, param=param)
        if self.num_in_flight + count > self.max_in_flight:
            raise QueueFullError(self._throughput.seconds_until(count, time.monotonic()))

    def _rejection_reason(self, count: int) -> str:
        if self.draining:
            return "draining"
        if self.dead_reason is not None:
            return "engine_dead"
        if self.info is None:
            return "loading"
        return "too_many_choices" if count > self.max_in_flight else "queue_full"

    def submit(self, message: Submit, reservation: Reservation | None = None) -> RequestStream:
        """Sends a request whose n choices take over n slots of `reservation` (None: slots are reserved now).

        From here on the stream owns the slots: each is free when its choice ends, or when the stream is closed. The
        engine finds an adapter by its fingerprint, so one that has been unloaded meanwhile is no error here.
        """
        if reservation is None:
            with self.reserve(message.n) as own_reservation:
                return self.submit(message, own_reservation)
        self.ready_info()
        assert message.request_id not in self._streams
        self._send(message)
        reservation.hand_over(message.n)
        stream = self._streams[message.request_id] = RequestStream(self, message)
        return stream

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """Those that are loaded, by name."""
        return self._adapters.loaded

    async def load_adapter(self, name: str, path: str, replaces: bool) -> None:
        """Raises BadRequestError in the engine's words, or EngineUnavailableError."""
        self.check_open()
        await self._adapters.load(name, path, replaces=replaces)

    async def unload_adapter(self, name: str) -> None:
        """As `load_adapter`, and AdapterNotFoundError. Requests that found it before are answered to their end."""
        self.check_open()
        await self._adapters.unload(name)

    def drain(self) -> None:
        """From now on no new work is accepted; what runs, runs on. Only for adapters nobody waits any more."""
        self.on_drain.set()
        self._adapters.fail(EngineUnavailableError(SHUTTING_DOWN, close=True))

    def fail_streams(self, error: APIError) -> None:
        """Ends every open stream with `error`, and their requests in the engine; nor are adapters waited for."""
        for stream in list(self._streams.values()):
            stream._fail(error)
        self._adapters.fail(error)

    def _send(self, message: ToEngine) -> None:
        """Never blocks: there is no high-water mark, and what waits is bounded by the slots."""
        if self._socket is not None and self.dead_reason is None:
            self._socket.send(self._encoder.encode(message))

    async def _receive(self) -> None:
        assert self._socket is not None
        try:
            while self.dead_reason is None:
                self._handle(self._decoder.decode(await self._socket.recv()))
        except Exception:
            logger.exception("cannot read from the engine")
            self._die("its messages cannot be read")

    def _handle(self, message: FromEngine) -> None:
        now = self._last_heartbeat = time.monotonic()
        match message:
            case Outputs():
                self._on_outputs(message, now)
            case Ready():
                self._on_ready(message)
            case Adapters():
                self._adapters.take(message.adapters)
            case AdapterDone():
                self._adapters.finish(message)

    def _on_outputs(self, message: Outputs, now: float) -> None:
        self.stats = message.stats
        if self._metrics is not None and message.num_step_tokens:
            self._metrics.observe_step(message.num_step_tokens)
        for event in message.events:
            if stream := self._streams.get(event.request_id):
                stream._push(event, now)

    def _on_ready(self, message: Ready) -> None:
        if self.info is not None:
            return
        self.info = message.info
        self._adapters.take(message.adapters)
        if self._metrics is not None:
            self._metrics.set_engine_info(self.info)
        if self._pidfd is None:
            self._watch_process(self.info.pid)

    def _watch_process(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._die("its process has ended")
        except OSError as exc:
            logger.warning("cannot watch the engine's process (%s); its heartbeat has to do", exc)
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._die, "its process has ended")

    def _is_stale(self) -> bool:
        return time.monotonic() - self._last_heartbeat > self._heartbeat_limit

    async def _watch_heartbeat(self) -> None:
        """Stale twice in a row, so that messages which wait while this process itself was stopped are read first."""
        num_stale = 0
        while num_stale < 2:
            await asyncio.sleep(HEARTBEAT_SECONDS / 2)
            num_stale = num_stale + 1 if self.is_ready and self._is_stale() else 0
        self._die(f"no step for more than {self._heartbeat_limit:g} seconds")

    def _die(self, reason: str) -> None:
        self._close_pidfd()
        if self.dead_reason is not None:
            return
        logger.error("the engine is gone: %s", reason)
        self.dead_reason = reason
        self.stats = msgspec.structs.replace(
            self.stats, num_running=0, num_waiting=0, num_blocks_used=0, running_adapters=[], waiting_adapters=[]
        )
        self.fail_streams(EngineDeadError())
        self.on_death.set()

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _release(self, count: int) -> None:
        self.num_in_flight -= count
        assert self.num_in_flight >= 0

    def _end_choice(self, choice: Choice, reason: FinishReason, now: float) -> None:
        self._release(1)
        self._throughput.add(now)
        if self._metrics is not None:
            self._metrics.observe_choice(choice, reason, now)

    def _end_stream(self, stream: RequestStream) -> None:
        del self._streams[stream.request_id]
        if self._metrics is not None:
            self._metrics.observe_request(stream.choices)


class Reservation:
    """Slots that are taken and not in use yet. Leaving its context gives back those that no stream took over."""

    def __init__(self, client: EngineClient, count: int) -> None:
        self.count = count
        self._client = client

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        count, self.count = self.count, 0
        self._client._release(count)

    def hand_over(self, count: int) -> None:
        """`count` slots now belong to a stream, which releases them itself."""
        assert count <= self.count
        self.count -= count


@dataclass(slots=True)
class Choice:
    """What is known here of one choice. Times are of `time.monotonic()`."""

    arrival: float
    max_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    times: RequestTimes | None = None  # the engine's account, so far
    ended: bool = False


class RequestStream:
    """The events of one request in batches: all that came since the last read. Ends when all n choices have ended.

    To be closed by whoever holds it (`async with`, or `aclose`): leaving early ends the request in the engine. If the
    engine dies, the iteration raises EngineDeadError, once.
    """

    def __init__(self, client: EngineClient, message: Submit) -> None:
        self.request_id = message.request_id
        self.choices = [
            Choice(message.arrival, message.params.max_tokens, len(message.prompt_token_ids)) for _ in range(message.n)
        ]
        self._client = client
        self._num_open = message.n
        self._events: list[TokenEvent] = []  # bounded by max_tokens of each choice
        self._error: APIError | None = None
        self._changed = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return self._num_open

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        while not self._events and self._num_open:
            self._changed.clear()
            await self._changed.wait()
        if self._events:
            events, self._events = self._events, []
            return events
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopAsyncIteration

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs, in the engine too, and drops what was not read. May be called again."""
        self._events = []
        self.abort(FinishReason.ABORT)

    def abort_choice(self, index: int, reason: FinishReason = FinishReason.STOP) -> None:
        """Ends one choice, in the engine too; no more events of it come. `reason` is what the metrics will say.

        That is STOP where a stop string was found, which only the caller can see.
        """
        self._events = [event for event in self._events if event.index != index]
        if not self.choices[index].ended:
            self._client._send(Abort(self.request_id, index))
            self._end(index, reason, time.monotonic())

    def abort(self, reason: FinishReason) -> None:
        """Ends what still runs, in the engine too. What came until now can still be read."""
        if not self._num_open:
            return
        self._client._send(Abort(self.request_id))
        now = time.monotonic()
        for index, choice in enumerate(self.choices):
            if not choice.ended:
                self._end(index, reason, now)

    def _fail(self, error: APIError) -> None:
        self._error = error
        self.abort(FinishReason.ERROR)

    def _push(self, event: TokenEvent, now: float) -> None:
        choice = self.choices[event.index]
        if choice.ended:
            return
        choice.times = event.times or choice.times
        if event.token_ids:
            self._count_tokens(choice, event, now)
        self._events.append(event)
        self._changed.set()
        if event.finish_reason is not None:
            self._end(event.index, event.finish_reason, now)

    def _count_tokens(self, choice: Choice, event: TokenEvent, now: float) -> None:
        metrics = self._client._metrics
        choice.num_output_tokens += len(event.token_ids)
        if choice.last_token is None:
            choice.first_token = now
            choice.num_cached_tokens = event.num_cached_tokens
            if metrics is not None:
                metrics.observe_first_token(now - choice.arrival)
        elif metrics is not None:
            metrics.observe_inter_token(now - choice.last_token)
        choice.last_token = now

    def _end(self, index: int, reason: FinishReason, now: float) -> None:
        choice = self.choices[index]
        choice.ended = True
        self._num_open -= 1
        self._client._end_choice(choice, reason, now)
        if not self._num_open:
            self._client._end_stream(self)
        self._changed.set()
