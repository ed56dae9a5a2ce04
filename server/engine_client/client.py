"""The API process's client of the engine process: submits requests and returns streams of their events."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import get_args

import msgspec

from engine.shared.messages import (
    AdapterDone,
    Adapters,
    EngineInfo,
    EngineStats,
    FromEngine,
    Hello,
    LoraAdapter,
    Outputs,
    Ready,
    Submit,
    ToEngine,
    Vocabulary,
)
from engine.shared.records import Answer
from server.engine_client.adapters import LoadedAdapters
from server.engine_client.admission import SHUTTING_DOWN, Admission, AdmissionLimits
from server.engine_client.connection import Damaged, EngineConnection
from server.engine_client.liveness import EngineLiveness
from server.engine_client.records import RecordQuestions
from server.engine_client.reservation import Reservation
from server.engine_client.streams import OpenStreams, RequestStream
from server.http.errors import APIError, EngineDeadError, EngineUnavailableError, ServerError
from server.metrics import Metrics
from server.tenants import ANYBODY, Tenant

ANSWERS = {answer.__name__ for answer in get_args(Answer)}
UNREADABLE = "The engine's reply cannot be read. Please retry later."

logger = logging.getLogger(__name__)


class EngineClient:
    """The API process's one connection to its engine, with admission control, liveness and LoRA adapters.

    All methods but `__init__` must be called on the event loop that called `start`.
    """

    def __init__(
        self,
        address: str,
        *,
        limits: AdmissionLimits,
        step_timeout: float,
        metrics: Metrics,
        engine_pid: int | None = None,
        can_restart: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Create a client; `start` connects it.

        Args:
            address: ZeroMQ address that the engine binds.
            limits: How many requests may wait, and for how long.
            step_timeout: Seconds that the longest step may take. An engine that is silent for longer is dead.
            metrics: Metrics that the client updates.
            engine_pid: Process id of the engine. None: its death is noticed only after it has become ready.
            can_restart: Whether an engine that dies after it has been ready is replaced, see `engine_started`.
            vocabulary: Vocabulary that the engine needs for grammars. None: no request may have a grammar.
        """
        self.stats = EngineStats()
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._connection = EngineConnection(address)
        self._liveness = EngineLiveness(
            step_timeout=step_timeout,
            engine_pid=engine_pid,
            can_restart=can_restart,
            on_loss=self._on_loss,
            on_death=self._on_death,
        )
        self._admission = Admission(self._liveness, metrics, limits)
        self._streams = OpenStreams(self._send_if_ready, self._admission, metrics)
        self._adapters = LoadedAdapters(self._connection.send)
        self.records = RecordQuestions(self._connection.send, self._liveness.check_ready)
        self._tasks: list[asyncio.Task[None]] = []  # of the current engine
        self._watchers: list[asyncio.Task[None]] = []  # of the heartbeat and of timeouts
        metrics.set_stats_source(self._current_stats)

    async def start(self) -> None:
        """Connect and ask the engine to report when it is ready. The engine may start later."""
        self._connect()
        self._liveness.start()
        watches = (self._liveness.watch_heartbeat(), self._admission.watch_timeouts())
        self._watchers = [asyncio.create_task(watch) for watch in watches]

    def engine_started(self, pid: int) -> None:
        """Connect to the engine that replaces a lost one. When it is ready, it gets the waiting requests."""
        self._liveness.engine_started(pid)
        if self.is_restarting:
            self._leave_engine()
            self._connect()

    def mark_dead(self, reason: str) -> None:
        """Fail all requests: no other engine will be started. `reason` is for the log."""
        self._liveness.mark_dead(reason)

    def _connect(self) -> None:
        self._connection.open()
        self._connection.send(Hello())
        if self._vocabulary is not None:
            self._connection.send(self._vocabulary)
        self._tasks.append(asyncio.create_task(self._receive()))

    async def close(self) -> None:
        """Stop the tasks, fail the open streams and close the connection."""
        tasks = [*self._tasks, *self._watchers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._watchers = [], []
        self.fail_streams(EngineUnavailableError("The server has stopped.", close=True))
        self._liveness.close()
        self._connection.close()

    # State of the engine.

    @property
    def info(self) -> EngineInfo | None:
        """The engine's properties, or None while it loads its model for the first time."""
        return self._liveness.info

    def ready_info(self) -> EngineInfo:
        """Return the engine's properties; see `EngineLiveness.ready_info`. Raises EngineUnavailableError."""
        return self._liveness.ready_info()

    @property
    def is_ready(self) -> bool:
        """True if the model is loaded, and the engine is neither being restarted nor dead."""
        return self._liveness.is_ready

    @property
    def is_restarting(self) -> bool:
        """True from the loss of a ready engine until another one is ready."""
        return self._liveness.is_restarting

    @property
    def restarting_since(self) -> float | None:
        """Unix time of the engine's loss, while it is being restarted."""
        return self._liveness.restarting_since

    @property
    def num_restarts(self) -> int:
        """Number of restarts of the engine, including one that is in progress."""
        return self._liveness.num_restarts

    @property
    def is_alive(self) -> bool:
        """True if the engine is loading or being restarted, or its step loop is responsive."""
        return self._liveness.is_alive

    @property
    def is_healthy(self) -> bool:
        """True if the engine is ready and its step loop is responsive."""
        return self._liveness.is_healthy

    @property
    def dead_reason(self) -> str | None:
        """Why the engine is dead for good, for the log; None if it is not."""
        return self._liveness.dead_reason

    @property
    def became_ready(self) -> asyncio.Event:
        """Set when the engine has loaded its model for the first time."""
        return self._liveness.became_ready

    @property
    def died(self) -> asyncio.Event:
        """Set when the engine dies for good."""
        return self._liveness.died

    # Admission.

    @property
    def num_in_flight(self) -> int:
        """Number of choices that are reserved or running."""
        return self._admission.num_in_flight

    @property
    def max_in_flight(self) -> int:
        """Maximum number of choices in flight. Raises EngineUnavailableError like `ready_info`."""
        return self._admission.max_in_flight

    @property
    def drain_requested(self) -> asyncio.Event:
        """Set when the server begins to shut down."""
        return self._admission.drain_requested

    def check_open(self) -> None:
        """Raise EngineUnavailableError if the server accepts no new work."""
        self._admission.check_open()

    def reserve(
        self, count: int, *, param: str = "n", tenant: Tenant = ANYBODY, queue_timeout: float | None = None
    ) -> Reservation:
        """Reserve capacity for `count` choices; see `Admission.reserve`."""
        return self._admission.reserve(count, param=param, tenant=tenant, queue_timeout=queue_timeout)

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Wait for capacity for up to `count` more choices; see `Admission.refill`."""
        return await self._admission.refill(reservation, count)

    def drain(self) -> None:
        """Admit no new work from now on. Running requests go on; pending changes of adapters fail."""
        self._admission.drain_requested.set()
        if not self.is_restarting:  # then there are only the changes that restore the adapters
            self._adapters.fail(EngineUnavailableError(SHUTTING_DOWN, close=True))

    # Requests.

    def submit(self, message: Submit, reservation: Reservation | None = None) -> RequestStream:
        """Send a request, as the reservation's tenant, and return the stream of its events.

        The capacity of its n choices moves from `reservation` to the stream (None reserves it here): it is returned
        choice by choice as they end, or when the stream is closed. The engine finds the adapter by its fingerprint, so
        a request for an adapter that has been unloaded since is not an error here.

        While the engine is being restarted, the request waits for it.

        Raises EngineUnavailableError like `ready_info`, QueueFullError if the request had to make room for another
        meanwhile; without a reservation, what `reserve` raises.
        """
        if reservation is None:
            with self.reserve(message.n) as own_reservation:
                return self.submit(message, own_reservation)
        self.ready_info()
        reservation.check()
        tenant = reservation.tenant
        own = msgspec.structs.replace(
            message,
            tenant=tenant.name,
            weight=tenant.weight,
            priority=tenant.allowed_priority(message.priority),
            cache_salt=tenant.salt(message.cache_salt),
        )
        tenant.account.count_prompt(len(message.prompt_token_ids))
        return self._streams.open(own, reservation)

    def fail_streams(self, error: APIError) -> None:
        """End all open streams with `error`, and their requests in the engine. Fail pending changes of adapters."""
        self._streams.fail(error)
        self._adapters.fail(error)
        self.records.fail(error)

    # LoRA adapters.

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The loaded adapters by name."""
        return self._adapters.by_name

    async def load_adapter(self, name: str, path: str, replaces: bool) -> None:
        """Load an adapter; see `LoadedAdapters.load`. Raises EngineUnavailableError if no new work is accepted."""
        self._check_adapters_can_change()
        await self._adapters.load(name, path, replaces=replaces)

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; see `LoadedAdapters.unload`. Raises EngineUnavailableError if no new work is accepted."""
        self._check_adapters_can_change()
        await self._adapters.unload(name)

    def _check_adapters_can_change(self) -> None:
        self.check_open()
        self._liveness.check_ready()

    # Messages from the engine.

    async def _receive(self) -> None:
        try:
            await self._connection.receive(self._on_message)
        except Exception:
            logger.exception("cannot read from the engine")
            self._liveness.lose("its messages cannot be read")

    def _on_message(self, message: FromEngine | Damaged) -> None:
        if isinstance(message, Damaged):
            self._on_damaged(message)
            return
        now = time.monotonic()
        self._liveness.on_message()
        match message:
            case Outputs():
                self._on_outputs(message, now)
            case Ready():
                self._on_ready(message)
            case Adapters():
                self._adapters.update(message.adapters)
            case AdapterDone():
                self._adapters.finish(message)
            case _:
                self.records.finish(message)

    def _on_outputs(self, message: Outputs, now: float) -> None:
        self.stats = message.stats
        if message.num_step_tokens:
            self._metrics.observe_step(message.num_step_tokens)
            self._admission.count_step(message, now)
            self.records.num_steps += 1
        self._streams.start(message.started)
        self._streams.push(message.events, now)

    def _on_damaged(self, message: Damaged) -> None:
        """End what a message is about which cannot be read: all questions or requests, if it does not even say that."""
        if not self.is_ready or message.type == Ready.__name__:
            self._liveness.lose("its messages cannot be read")
        elif message.request_id:
            self._adapters.finish(AdapterDone(request_id=message.request_id, error=UNREADABLE, is_temporary=True))
        elif message.events:
            self._streams.discard([event.request_id for event in message.events], ServerError())
        elif message.type in ANSWERS:
            self.records.fail(ServerError())
        elif message.type != Adapters.__name__:
            self.fail_streams(ServerError())

    def _on_ready(self, message: Ready) -> None:
        self._metrics.set_engine_info(message.info)
        if self.is_restarting:
            self._tasks.append(asyncio.create_task(self._resume(message)))
        elif self.info is None:
            self._adapters.update(message.adapters)
            self._liveness.set_ready(message.info)

    async def _resume(self, message: Ready) -> None:
        """Give a restarted engine the adapters that were loaded, and then the waiting requests."""
        await self._adapters.restore(message.adapters)
        self._liveness.set_ready(message.info)
        self._streams.submit_again(self.adapters)

    def _send_if_ready(self, message: ToEngine) -> None:
        """Send a message about a request. A restarting engine gets all waiting requests when it is ready."""
        if self.is_ready:
            self._connection.send(message)

    def _current_stats(self) -> EngineStats:
        """Return the engine's latest statistics. While it is being restarted, requests wait in this process."""
        if not self.is_restarting:
            return self.stats
        return msgspec.structs.replace(self.stats, num_waiting=self._streams.num_waiting)

    def _on_loss(self) -> None:
        """The engine is being restarted: fail the requests that have had tokens; the others wait for it."""
        self._metrics.count_restart()
        self._adapters.keep()
        self._leave_engine()
        self._streams.lose_engine(EngineDeadError())

    def _on_death(self) -> None:
        self._leave_engine()
        self.fail_streams(EngineDeadError())

    def _leave_engine(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._connection.disconnect()
        self._adapters.fail(EngineDeadError())
        self.records.fail(EngineDeadError())
        self.stats = msgspec.structs.replace(
            self.stats, num_running=0, num_waiting=0, num_blocks_used=0, running_adapters=[], waiting_adapters=[]
        )
