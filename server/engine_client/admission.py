"""Admission control: how many choices may be in flight, and who waits or is rejected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from server.engine_client.liveness import EngineLiveness
from server.engine_client.reservation import Reservation
from server.engine_client.retry_after import Throughput
from server.engine_client.shares import Shares
from server.http.errors import APIError, EngineUnavailableError, InvalidValueError, QueueFullError
from server.metrics import Metrics
from server.tenants import Tenant

SHUTTING_DOWN = "The server is shutting down. Please retry later."
REFILL_SECONDS = 0.02  # interval at which `refill` looks for free capacity


class Admission:
    """Admits requests up to the capacity of the engine and its queue, and shares it between tenants."""

    def __init__(self, liveness: EngineLiveness, metrics: Metrics, *, max_queued_requests: int) -> None:
        self.drain_requested = asyncio.Event()  # set: no new work is admitted
        self._liveness = liveness
        self._metrics = metrics
        self._max_queued_requests = max_queued_requests
        self._throughput = Throughput()
        self._shares = Shares()

    @property
    def num_in_flight(self) -> int:
        """Number of choices that are reserved or running."""
        return self._shares.num_choices

    @property
    def max_in_flight(self) -> int:
        """Maximum number of choices in flight: those in the engine's batch and those that wait for it."""
        return self._liveness.ready_info().max_num_seqs + self._max_queued_requests

    def check_open(self) -> None:
        """Raise EngineUnavailableError if the server accepts no new work."""
        if self.drain_requested.is_set():
            raise EngineUnavailableError(SHUTTING_DOWN, close=True)
        self._liveness.ready_info()

    def reserve(self, count: int, *, param: str, tenant: Tenant) -> Reservation:
        """Reserve capacity for `count` choices (n for each prompt) of a tenant's request, all or none.

        If it is full, waiting requests of a tenant that holds more than its share may end with QueueFullError. Call it
        before doing anything expensive for a request. `param` is the field that an InvalidValueError names.

        Raises:
            EngineUnavailableError: The engine is not ready, or the server is shutting down.
            QueueFullError: There is no capacity at the moment.
            InvalidValueError: `count` is more than the total capacity.
        """
        try:
            self._check(count, param)
            ended = self._make_room(count, tenant)
        except APIError:
            self._metrics.count_rejection(self._rejection_reason(count))
            raise
        for request in ended:
            self._metrics.count_rejection("evicted")
            request.fail(self._queue_full(request.num_choices))
        if self.num_in_flight == 0:
            self._throughput.start(time.monotonic())
        reservation = Reservation(tenant, self._shares.update)
        reservation.add(count)
        return reservation

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Wait for free capacity and add between 1 and `count` choices to the reservation of an admitted request.

        Returns the number of choices added. Raises EngineUnavailableError if the engine dies, or the error that ended
        the request.
        """
        while (num_free := min(count, self.max_in_flight - self.num_in_flight)) <= 0:
            self._liveness.ready_info()
            await asyncio.sleep(REFILL_SECONDS)
        reservation.check()
        reservation.add(num_free)
        return num_free

    def end_choice(self, reservation: Reservation, now: float) -> None:
        """Return the capacity of a choice that ended, and count it for the throughput estimate."""
        reservation.end_choice()
        self._throughput.add(now)

    def _check(self, count: int, param: str) -> None:
        self.check_open()
        if count > self.max_in_flight:
            message = (
                f"The request asks for {count} choices (n for each prompt), "
                f"but this server holds {self.max_in_flight} at a time."
            )
            raise InvalidValueError(message, param=param)

    def _make_room(self, count: int, tenant: Tenant) -> Sequence[Reservation]:
        """Return the waiting requests to end. Raises QueueFullError."""
        ended = self._shares.make_room(tenant, count, self.max_in_flight)
        if ended is None:
            raise self._queue_full(count)
        return ended

    def _queue_full(self, count: int) -> QueueFullError:
        return QueueFullError(self._throughput.seconds_until(count, time.monotonic()))

    def _rejection_reason(self, count: int) -> str:
        if self.drain_requested.is_set():
            return "draining"
        if self._liveness.dead_reason is not None:
            return "engine_dead"
        if self._liveness.info is None:
            return "loading"
        return "too_many_choices" if count > self.max_in_flight else "queue_full"
