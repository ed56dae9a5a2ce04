"""Admission control: how many choices may be in flight, who waits, how long, and who is rejected."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.shared.messages import EngineInfo
from server.engine_client.liveness import usable_info
from server.engine_client.reservation import Backlog, Reservation, Shares
from server.http.errors import (
    APIError,
    EngineUnavailableError,
    InvalidValueError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    WaitTooLongError,
)
from server.metrics import ChoiceStats, Metrics
from server.tenants import ANYBODY, Tenant

SHUTTING_DOWN = "The server is shutting down. Please retry later."
TIMEOUT_SECONDS = 0.1  # interval at which timeouts are checked
WINDOW = 30.0  # seconds; the weight of what was measured falls by a factor of e in this time
MIN_SECONDS = 1.0  # of measurement, before which there is no estimate
FIRST_OUTPUT = 128.0  # tokens that an output is expected to have before any has ended
OUTPUT_SHARE = 0.05  # of the latest output in the mean length
REFILL_SECONDS = 0.02  # interval at which `refill` looks for free capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """How many choices may wait in addition to those that the engine runs, and for how long. Times are in seconds."""

    max_queued_requests: int
    queue_timeout: float = math.inf  # until the engine begins with a request
    request_timeout: float = math.inf  # until it ends


class WaitEstimate:
    """Predicts waits from the throughput of the engine while requests wait for it. Times are `time.monotonic()`.

    Work is measured in tokens: those that steps compute, and prompt tokens found in the prefix cache. A waiting choice
    is expected to take its prompt, and as many output tokens as recent choices had on average, at most its max_tokens.
    Tenants are served in turn, by weight. Until a tenant's own backlog of q tokens is served, every other tenant gets
    at most q times the ratio of their weights, and no more than its backlog:

        wait = (q + sum of min(backlog, q * weight / own weight) of the others) / throughput

    It is a lower bound in that work that arrives later is left out, and so are running choices, which hold their slots
    for a while yet.
    """

    def __init__(self) -> None:
        self._tokens = 0.0  # a decaying sum, over the time in which requests waited
        self._seconds = 0.0  # that time, decaying likewise
        self.is_measuring = False  # requests waited after the last step
        self._measured_until = 0.0
        self.mean_output = FIRST_OUTPUT  # tokens that recent outputs had on average

    def add_step(self, num_tokens: int, now: float, *, is_saturated: bool) -> None:
        """Count the tokens of a step. Only the time between steps after which requests still wait is measured."""
        if self.is_measuring:
            seconds = now - self._measured_until
            kept = math.exp(-seconds / WINDOW)
            self._tokens = self._tokens * kept + num_tokens
            self._seconds = self._seconds * kept + seconds
        self.is_measuring, self._measured_until = is_saturated, now

    def add_cached(self, num_tokens: int) -> None:
        """Count prompt tokens that were found in the prefix cache."""
        if self.is_measuring:
            self._tokens += num_tokens

    def add_output(self, num_tokens: int) -> None:
        """Note the length of an output that has ended."""
        self.mean_output += OUTPUT_SHARE * (num_tokens - self.mean_output)

    def seconds(self, own: Backlog, others: Iterable[Backlog]) -> float:
        """Return the predicted wait of a request behind a tenant's backlog; 0 if nothing has been measured yet."""
        if self._seconds < MIN_SECONDS or not self._tokens:
            return 0.0
        ahead = sum(min(other.tokens, own.tokens * other.weight / own.weight) for other in others)
        return (own.tokens + ahead) * self._seconds / self._tokens


class Admission:
    """Admits requests up to the capacity of the engine and its queue, and shares it between tenants."""

    def __init__(self, metrics: Metrics, limits: AdmissionLimits) -> None:
        self.drain_requested = asyncio.Event()  # set: no new work is admitted
        self.info: EngineInfo | None = None  # with the shortest context; None while all load the model the first time
        self.max_num_seqs = 0  # choices that run at a time; 0 before an engine was ready
        self.dead_reason: str | None = None  # why the last engine died for good, for the log; None while one is left
        self._metrics = metrics
        self._limits = limits
        self.estimate = WaitEstimate()
        self._shares = Shares()
        self._num_waiting: dict[int, int] = {}  # choices in the queue of each engine, by its number

    @property
    def num_in_flight(self) -> int:
        """Number of choices that are reserved or running."""
        return self._shares.num_choices

    @property
    def max_in_flight(self) -> int:
        """Maximum number of choices in flight: those in the engines' batches and those that wait for it."""
        return self.max_num_seqs + self._limits.max_queued_requests

    def update(self) -> None:
        """Note that the state of an engine has changed."""

    def accepts(self, info: EngineInfo) -> bool:
        """Return whether the answers of an engine that loads are those of the other ones."""
        return True

    def ready_info(self) -> EngineInfo:
        """Return `info`. Raises EngineUnavailableError before an engine was ready, and once all are dead."""
        if self.info is not None and self.dead_reason is None:
            return self.info
        return usable_info(self.info, self.dead_reason)  # which raises

    def check_open(self) -> None:
        """Raise EngineUnavailableError if the server accepts no new work."""
        if self.drain_requested.is_set():
            raise EngineUnavailableError(SHUTTING_DOWN, close=True)
        self.ready_info()

    async def admit(
        self, count: int, *, param: str = "n", tenant: Tenant, queue_timeout: float | None = None
    ) -> Reservation:
        """Like `reserve`, wherever the capacity is counted."""
        return self.reserve(count, param=param, tenant=tenant, queue_timeout=queue_timeout)

    def reserve(
        self, count: int, *, param: str = "n", tenant: Tenant = ANYBODY, queue_timeout: float | None = None
    ) -> Reservation:
        """Reserve capacity for `count` choices (n for each prompt) of a tenant's request, all or none.

        If it is full, waiting requests of a tenant that holds more than its share may end with QueueFullError. Call it
        before doing anything expensive for a request. `param` is the field that an InvalidValueError names, and
        `queue_timeout` the seconds that the request itself is ready to wait.

        Raises:
            EngineUnavailableError: The engine is not ready, or the server is shutting down.
            QueueFullError: There is no capacity at the moment, or the request would wait for too long.
            InvalidValueError: `count` is more than the total capacity.
        """
        queue_timeout = min(self._limits.queue_timeout, queue_timeout or math.inf)
        is_open = self.info is not None and self.dead_reason is None and not self.drain_requested.is_set()
        if not (is_open and self._shares.num_choices + count <= self.max_num_seqs):
            self._make_way(count, param, tenant, queue_timeout)
        reservation = Reservation(tenant, self._shares.update)
        now = asyncio.get_running_loop().time()
        reservation.queue_timeout = queue_timeout
        reservation.start_by, reservation.end_by = now + queue_timeout, now + self._limits.request_timeout
        reservation.add(count)
        return reservation

    def _make_way(self, count: int, param: str, tenant: Tenant, queue_timeout: float) -> None:
        """Decide about a request that the engines do not run at once. Raises as `reserve`."""
        try:
            self._check(count, param)
            if (wait := self._predicted_wait(tenant)) > queue_timeout:
                raise WaitTooLongError(wait, queue_timeout, self._retry_after(tenant))
            ended = self._shares.make_room(tenant, count, self.max_in_flight)
            if ended is None:
                raise QueueFullError(self._retry_after(tenant))
        except APIError as error:
            self._metrics.count_rejection(self._rejection_reason(count, error))
            raise
        for request in ended:
            self._metrics.count_rejection("evicted")
            request.fail(QueueFullError(self._retry_after(request.tenant)))

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Wait for free capacity and add between 1 and `count` choices to the reservation of an admitted request.

        Returns the number of choices added. Raises EngineUnavailableError if the engine dies, or the error that ended
        the request.
        """
        self.ready_info()
        while (num_free := min(count, self.max_in_flight - self.num_in_flight)) <= 0:
            await asyncio.sleep(REFILL_SECONDS)
            self.ready_info()
        reservation.check()
        reservation.add(num_free)
        return num_free

    def expect(self, reservation: Reservation, choices: Sequence[ChoiceStats]) -> None:
        """Note the work of choices that are sent to the engine. They share their prompt."""
        for index, stats in enumerate(choices):
            num_prompt_tokens = 0 if index else stats.num_prompt_tokens
            stats.num_expected_tokens = num_prompt_tokens + min(stats.max_tokens, self.estimate.mean_output)
            reservation.num_waiting_tokens += stats.num_expected_tokens

    def start_choice(self, reservation: Reservation, stats: ChoiceStats, num_cached_tokens: int) -> None:
        """Note that the engine has begun with a choice."""
        if num_cached_tokens:
            self.estimate.add_cached(num_cached_tokens)
        reservation.num_waiting_tokens -= stats.num_expected_tokens
        stats.num_expected_tokens = 0.0

    def end_choice(self, reservation: Reservation, stats: ChoiceStats) -> None:
        """Return the capacity of a choice that ended."""
        reservation.num_waiting_tokens -= stats.num_expected_tokens
        stats.num_expected_tokens = 0.0
        if stats.num_output_tokens:
            self.estimate.add_output(stats.num_output_tokens)
        reservation.end_choice()

    def count_step(self, num_tokens: int, now: float, engine: int, num_waiting: int) -> None:
        """Count the tokens of an engine's step, for the estimate of waits. After it, `num_waiting` choices wait."""
        self._num_waiting[engine] = num_waiting
        is_saturated = any(self._num_waiting.values())
        if is_saturated or self.estimate.is_measuring:
            self.estimate.add_step(num_tokens, now, is_saturated=is_saturated)

    def forget_waiting(self, engine: int) -> None:
        """Note that nothing waits in an engine."""
        self._num_waiting.pop(engine, None)

    async def watch_timeouts(self) -> None:
        """End requests that wait or take too long, until cancelled."""
        while True:
            await asyncio.sleep(TIMEOUT_SECONDS)
            now = asyncio.get_running_loop().time()
            for request in self._shares.requests():
                self._check_timeouts(request, now)

    def _check_timeouts(self, request: Reservation, now: float) -> None:
        if now > request.end_by:
            self._metrics.count_rejection("request_timeout")
            request.fail(RequestTimeoutError(self._limits.request_timeout))
        elif now > request.start_by and request.is_waiting:
            self._metrics.count_rejection("queue_timeout")
            request.fail(QueueTimeoutError(request.queue_timeout, self._retry_after(request.tenant)))

    def _check(self, count: int, param: str) -> None:
        self.check_open()
        if count > self.max_in_flight:
            message = (
                f"The request asks for {count} choices (n for each prompt), "
                f"but this server holds {self.max_in_flight} at a time."
            )
            raise InvalidValueError(message, param=param)

    def _predicted_wait(self, tenant: Tenant) -> float:
        """Return the seconds that a tenant's next request would wait."""
        if self.info is None or self.num_in_flight < self.max_num_seqs:
            return 0.0
        return self.estimate.seconds(*self._shares.backlogs(tenant))

    def _retry_after(self, tenant: Tenant) -> float:
        """Return the predicted wait, with jitter so that clients do not come back all at once."""
        return self._predicted_wait(tenant) * random.uniform(0.8, 1.2)

    def _rejection_reason(self, count: int, error: APIError) -> str:
        if isinstance(error, WaitTooLongError):
            return "predicted_wait"
        if self.drain_requested.is_set():
            return "draining"
        if self.dead_reason is not None:
            return "engine_dead"
        if self.info is None:
            return "loading"
        return "too_many_choices" if count > self.max_in_flight else "queue_full"
