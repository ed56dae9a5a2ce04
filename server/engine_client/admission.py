"""Admission control: how many choices may be in flight, and who waits or is rejected."""

from __future__ import annotations

import asyncio
import time

from server.engine_client.liveness import EngineLiveness
from server.engine_client.retry_after import Throughput
from server.http.errors import APIError, EngineUnavailableError, InvalidValueError, QueueFullError
from server.metrics import Metrics
from server.tenants import Tenant

SHUTTING_DOWN = "The server is shutting down. Please retry later."
REFILL_SECONDS = 0.02  # interval at which `refill` looks for free capacity


class Admission:
    """Counts the choices in flight and rejects requests beyond the capacity of the engine and its queue."""

    def __init__(self, liveness: EngineLiveness, metrics: Metrics, *, max_queued_requests: int) -> None:
        self.num_in_flight = 0
        self.drain_requested = asyncio.Event()  # set: no new work is admitted
        self._liveness = liveness
        self._metrics = metrics
        self._max_queued_requests = max_queued_requests
        self._throughput = Throughput()

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

        Call it before doing anything expensive for a request. `param` is the field that an InvalidValueError names.

        Raises:
            EngineUnavailableError: The engine is not ready, or the server is shutting down.
            QueueFullError: There is no capacity at the moment.
            InvalidValueError: `count` is more than the total capacity.
        """
        try:
            self._check(count, param)
        except APIError:
            self._metrics.count_rejection(self._rejection_reason(count))
            raise
        if self.num_in_flight == 0:
            self._throughput.start(time.monotonic())
        self.num_in_flight += count
        return Reservation(self, count, tenant)

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Wait for free capacity and add between 1 and `count` choices to the reservation of an admitted request.

        Returns the number of choices added. Raises EngineUnavailableError if the engine dies.
        """
        while (num_free := min(count, self.max_in_flight - self.num_in_flight)) <= 0:
            self._liveness.ready_info()
            await asyncio.sleep(REFILL_SECONDS)
        self.num_in_flight += num_free
        reservation.count += num_free
        return num_free

    def release(self, count: int) -> None:
        """Return the capacity of `count` choices."""
        self.num_in_flight -= count
        assert self.num_in_flight >= 0

    def end_choice(self, now: float) -> None:
        """Return the capacity of a choice that ended, and count it for the throughput estimate."""
        self.release(1)
        self._throughput.add(now)

    def _check(self, count: int, param: str) -> None:
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
        if self.drain_requested.is_set():
            return "draining"
        if self._liveness.dead_reason is not None:
            return "engine_dead"
        if self._liveness.info is None:
            return "loading"
        return "too_many_choices" if count > self.max_in_flight else "queue_full"


class Reservation:
    """Reserved capacity that no stream uses yet. Leaving its context returns what is left of it."""

    def __init__(self, admission: Admission, count: int, tenant: Tenant) -> None:
        self.count = count
        self.tenant = tenant
        self._admission = admission

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Return the rest of the capacity."""
        count, self.count = self.count, 0
        self._admission.release(count)

    def hand_over(self, count: int) -> None:
        """Pass the capacity of `count` choices to a stream, which returns it itself."""
        assert count <= self.count
        self.count -= count
