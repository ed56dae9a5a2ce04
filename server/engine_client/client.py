"""The API process's client of its engine: admits and submits requests, and returns streams of their events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from engine.shared.messages import LoraAdapter, Submit
from server.engine_client.admission import SHUTTING_DOWN, Admission, AdmissionLimits
from server.engine_client.connected_engine import ConnectedEngine, EngineOptions
from server.engine_client.reservation import Reservation
from server.engine_client.streams import EventInbox, OpenStreams, RequestStream
from server.http.errors import APIError, EngineUnavailableError
from server.metrics import Metrics
from server.settings.process_configs import EngineProcess


class EngineClient(Admission):
    """The API process's access to the engine of a model, with admission control.

    The part for data parallelism has one for several engines; state and connections are those of all of them.
    All methods but `__init__` must be called on the event loop that called `start`.
    """

    streams_type = OpenStreams

    def __init__(
        self, processes: Sequence[EngineProcess], options: EngineOptions, *, limits: AdmissionLimits, metrics: Metrics
    ) -> None:
        """Create a client; `start` connects it.

        Args:
            processes: The engines by number.
            options: What the engines have in common.
            limits: How many requests may wait, and for how long.
            metrics: Metrics that the client updates.
        """
        super().__init__(metrics, limits)
        names = ["the engine"] if len(processes) == 1 else [f"engine {number}" for number in range(len(processes))]
        self.engines = [
            ConnectedEngine(number, process, options, name=name, owner=self, metrics=metrics, streams=self.streams_type)
            for number, (name, process) in enumerate(zip(names, processes, strict=True))
        ]
        self.alive = self.engines  # those that load, are ready or are being restarted
        self.became_ready = asyncio.Event()  # the first one
        self.died = asyncio.Event()  # the last one
        self.changed = asyncio.Event()  # the state of one, since its reader has cleared it
        self.listeners: list[Callable[[], None]] = []  # called when the state of an engine or its adapters change
        self._watcher: asyncio.Task[None] | None = None  # of timeouts

    async def start(self) -> None:
        """Connect and ask the engines to report when they are ready. They may start later."""
        for engine in self.engines:
            engine.start()
        self._watcher = asyncio.create_task(self.watch_timeouts())

    async def close(self) -> None:
        """Stop the tasks, fail the open streams and close the connections."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        for engine in self.engines:
            await engine.close(EngineUnavailableError("The server has stopped.", close=True))

    def drain(self) -> None:
        """Admit no new work from now on. Running requests go on; pending changes of adapters fail."""
        self.drain_requested.set()
        for engine in self.engines:
            if not engine.liveness.is_restarting:  # then there are only the changes that restore the adapters
                engine.adapters.fail(EngineUnavailableError(SHUTTING_DOWN, close=True))

    # State.

    def update(self) -> None:
        self.alive = [engine for engine in self.engines if engine.liveness.dead_reason is None]
        infos = [engine.liveness.info for engine in self.alive or self.engines if engine.liveness.info is not None]
        self.info = min(infos, key=lambda info: info.max_model_len, default=None)
        self.max_num_seqs = sum(info.max_num_seqs for info in infos) if self.alive else 0
        self.dead_reason = None if self.alive else self.engines[-1].liveness.dead_reason
        self.changed.set()
        if self.is_ready:
            self.became_ready.set()
        if self.dead_reason is not None:
            self.died.set()
        self.tell_listeners()

    @property
    def ready_pids(self) -> tuple[int, ...]:
        """Process ids of the engines that are ready."""
        return tuple(engine.liveness.ready_info().pid for engine in self.engines if engine.liveness.is_ready)

    @property
    def is_ready(self) -> bool:
        """True if an engine is ready."""
        return any(engine.liveness.is_ready for engine in self.engines)

    @property
    def restarting_since(self) -> float | None:
        """Unix time of the first loss, while no engine is ready and one is being restarted."""
        losses = [engine.liveness.restarting_since for engine in self.engines]
        return None if self.is_ready else min((loss for loss in losses if loss is not None), default=None)

    @property
    def num_restarts(self) -> int:
        """Number of restarts of the engines, including those that are in progress."""
        return sum(engine.liveness.num_restarts for engine in self.engines)

    @property
    def is_alive(self) -> bool:
        """True if an engine is loading or being restarted, or its step loop is responsive."""
        return any(engine.liveness.is_alive for engine in self.engines)

    @property
    def is_healthy(self) -> bool:
        """True if an engine is ready and its step loop is responsive."""
        return any(engine.liveness.is_healthy for engine in self.engines)

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The LoRA adapters that are loaded, by name."""
        return self.engines[0].adapters.by_name

    @property
    def states(self) -> dict[str, object]:
        """The state of each engine, for the probes, if there are several."""
        return {}

    def tell_listeners(self) -> None:
        """Say that the state of an engine, or of LoRA adapters, has changed."""
        for listener in self.listeners:
            listener()

    # Requests.

    def submit_all(self, messages: Sequence[Submit], reservation: Reservation) -> list[RequestStream]:
        """Submit all of the requests or none, whose streams share an inbox. Raises as `submit`."""
        streams: list[RequestStream] = []
        inbox = EventInbox()
        try:
            for message in messages:
                streams.append(self.submit(message, reservation, inbox))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def submit(
        self, message: Submit, reservation: Reservation | None = None, inbox: EventInbox | None = None
    ) -> RequestStream:
        """Send a request, as the reservation's tenant, and return the stream of its events.

        The capacity of its n choices moves from `reservation` to the stream (None reserves it here): it is returned
        choice by choice as they end, or when the stream is closed. The engine finds the adapter by its fingerprint, so
        a request for an adapter that has been unloaded since is not an error here. While no engine is ready, the
        request waits for one that is being restarted.

        Raises EngineUnavailableError like `ready_info`, QueueFullError if the request had to make room for another
        meanwhile; without a reservation, what `reserve` raises.
        """
        if reservation is None:
            with self.reserve(message.n) as own_reservation:
                return self.submit(message, own_reservation, inbox)
        self.ready_info()
        reservation.check()
        tenant = reservation.tenant
        own = msgspec.structs.replace(
            message,
            tenant=tenant.name,
            weight=tenant.weight,
            priority=tenant.allowed_priority(message.priority) if message.priority < 0 else message.priority,
            cache_salt=tenant.salt(message.cache_salt) if tenant.has_own_cache else message.cache_salt,
        )
        tenant.account.count_tokens(prompt=len(message.prompt_token_ids))
        return self.open(own, reservation, inbox)

    def open(self, message: Submit, reservation: Reservation, inbox: EventInbox | None) -> RequestStream:
        """Send a request to an engine, and return its stream."""
        return self.engines[0].streams.open(message, reservation, inbox=inbox)

    def fail_streams(self, error: APIError) -> None:
        """End all open streams with `error`, and their requests in the engines. Fail pending changes of adapters."""
        for engine in self.engines:
            engine.fail_streams(error)
