"""The API process's client of its engines: submits requests and returns streams of their events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from engine.shared.messages import Submit
from server.engine_client.admission import SHUTTING_DOWN, Admission, AdmissionLimits
from server.engine_client.connected_engine import ConnectedEngine, EngineOptions
from server.engine_client.engine_group import EngineGroup
from server.engine_client.reservation import Reservation
from server.engine_client.streams import EventInbox, RequestStream
from server.http.errors import APIError, EngineUnavailableError
from server.metrics import Metrics
from server.settings.process_configs import EngineProcess
from server.tenants import ANYBODY, Tenant


class EngineClient(EngineGroup):
    """The API process's access to the engines of a model, with admission control and LoRA adapters.

    All methods but `__init__` must be called on the event loop that called `start`.
    """

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
        super().__init__()
        self._admission = Admission(self, metrics, limits)
        for number, process in enumerate(processes):
            engine = ConnectedEngine(
                number,
                process,
                options,
                name="the engine" if len(processes) == 1 else f"engine {number}",
                admission=self._admission,
                metrics=metrics,
                on_change=self.update,
                accepts=self.accepts,
            )
            self.add(engine)
        self.adapter_listeners: list[Callable[[], None]] = []  # called when adapters have been loaded or unloaded
        self._watcher: asyncio.Task[None] | None = None  # of timeouts

    async def start(self) -> None:
        """Connect and ask the engines to report when they are ready. They may start later."""
        for engine in self.engines:
            engine.start()
        self._watcher = asyncio.create_task(self._admission.watch_timeouts())

    async def close(self) -> None:
        """Stop the tasks, fail the open streams and close the connections."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        for engine in self.engines:
            await engine.close(EngineUnavailableError("The server has stopped.", close=True))

    # Admission.

    @property
    def num_in_flight(self) -> int:
        """Number of choices that are reserved or running."""
        return self._admission.num_in_flight

    @property
    def max_in_flight(self) -> int:
        """Maximum number of choices in flight."""
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

    async def admit(
        self, count: int, *, param: str = "n", tenant: Tenant, queue_timeout: float | None = None
    ) -> Reservation:
        """Like `reserve`, wherever the capacity is counted."""
        return self._admission.reserve(count, param=param, tenant=tenant, queue_timeout=queue_timeout)

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Wait for capacity for up to `count` more choices; see `Admission.refill`."""
        return await self._admission.refill(reservation, count)

    def drain(self) -> None:
        """Admit no new work from now on. Running requests go on; pending changes of adapters fail."""
        self._admission.drain_requested.set()
        for engine in self.engines:
            if not engine.liveness.is_restarting:  # then there are only the changes that restore the adapters
                engine.adapters.fail(EngineUnavailableError(SHUTTING_DOWN, close=True))

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
        a request for an adapter that has been unloaded since is not an error here.

        `choose` says to which engine it goes. While none is ready, it waits for one that is being restarted.

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
        if len(self.engines) == 1:
            return self.engines[0].streams.open(own, reservation, inbox=inbox)
        engine, num_cached_tokens = self.choose(own)
        return engine.streams.open(own, reservation, num_cached_tokens, inbox)

    def fail_streams(self, error: APIError) -> None:
        """End all open streams with `error`, and their requests in the engines. Fail pending changes of adapters."""
        for engine in self.engines:
            engine.fail_streams(error)

    # LoRA adapters.

    async def load_adapter(self, name: str, path: str, replaces: bool) -> None:
        """Load an adapter into all engines, or none; see `LoadedAdapters.load`.

        If only some engines fail to replace one, all unload it. Raises EngineUnavailableError if no new work is
        accepted.
        """
        engines = self._engines_to_change()
        loads = [engine.adapters.load(name, path, replaces=replaces) for engine in engines]
        errors = [result for result in await asyncio.gather(*loads, return_exceptions=True) if result is not None]
        self._adapters_changed()
        if not errors:
            return
        if len(errors) < len(engines):
            unloads = [engine.adapters.unload(name) for engine in engines if engine.liveness.is_ready]
            await asyncio.gather(*unloads, return_exceptions=True)
        raise errors[0]

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; see `LoadedAdapters.unload`. Raises EngineUnavailableError if no new work is accepted."""
        unloads = [engine.adapters.unload(name) for engine in self._engines_to_change()]
        self._adapters_changed()
        await asyncio.gather(*unloads)

    def _adapters_changed(self) -> None:
        for listener in self.adapter_listeners:
            listener()

    def _engines_to_change(self) -> Sequence[ConnectedEngine]:
        """Return the engines that are left. Raises EngineUnavailableError unless all are ready."""
        self.check_open()
        for engine in self.alive:
            engine.liveness.check_ready()
        return self.alive
