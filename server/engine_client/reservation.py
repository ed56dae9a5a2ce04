"""Admitted requests: the capacity that each holds, what tenants hold, and whose request makes room for another."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from server.engine_client.answer_budget import AnswerShare
from server.http.errors import APIError
from server.tenants import Tenant


class FailingStream(Protocol):
    """The part of a `RequestStream` that its reservation uses."""

    def fail(self, error: APIError) -> None:
        """Abort the request in the engine, and raise `error` to the reader."""


class Reservation:
    """The capacity of a tenant's request. Leaving its context returns what no stream uses.

    Streams return the capacity of their choices themselves, one by one as they end.
    """

    def __init__(self, tenant: Tenant, on_change: Callable[[Reservation, int], None]) -> None:
        """Begin without capacity. `on_change` is called with each change of `num_choices`."""
        self.tenant = tenant
        self.count = 0  # reserved choices that no stream uses yet
        self.num_choices = 0  # these and those in streams
        self.started: float | None = None  # when the engine has reported that it has begun with it
        self.has_output = False  # there are events of it
        self.num_lost_starts = 0  # how often it had started, without output, in an engine that was lost
        self.is_answered = False  # the client has its HTTP status
        self.num_waiting_tokens = 0.0  # that the engine is expected to compute for choices that it has not begun with
        self.queue_timeout = math.inf  # seconds
        self.start_by = self.end_by = math.inf  # times of the event loop
        self.answer: AnswerShare | None = None  # counts its events; None: they are few
        self.on_start: Callable[[], None] | None = None  # called when the engine begins with it
        self.on_failure: Callable[[APIError], None] | None = None  # called when an error ends it
        self._on_change = on_change
        self._streams: set[FailingStream] = set()
        self.error: APIError | None = None  # that ended the request
        self._is_settled = asyncio.Event()  # it has started, failed or ended

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    @property
    def is_waiting(self) -> bool:
        """True if nothing is lost by ending the request, because the engine has not begun with it."""
        return self.started is None and self.error is None

    def add(self, count: int) -> None:
        """Reserve the capacity of `count` more choices, which the caller has found free."""
        self.count += count
        self._change_choices(count)

    def release(self) -> None:
        """Return the capacity that no stream uses."""
        count, self.count = self.count, 0
        if count:
            self._change_choices(-count)

    def hand_over(self, count: int, stream: FailingStream) -> None:
        """Pass the capacity of `count` choices to a stream, which calls `end_choice` for each."""
        assert count <= self.count
        self.count -= count
        self._streams.add(stream)

    def end_choice(self) -> None:
        """Return the capacity of a choice that ended in a stream."""
        self._change_choices(-1)

    def end_stream(self, stream: FailingStream) -> None:
        """Forget a stream whose choices have ended."""
        self._streams.discard(stream)

    def start(self) -> None:
        """Note that the engine has begun with the request."""
        if self.started is None:
            self.started = time.monotonic()
            self._is_settled.set()
            if self.on_start is not None:
                self.on_start()

    def lose_start(self) -> None:
        """Note that the engine is lost. A request without output waits for the next one, in its place in the queue.

        The time in which the engine computed it does not count as waiting.
        """
        if self.started is not None and not self.has_output:
            self.start_by += time.monotonic() - self.started
            self.started = None
            self.num_lost_starts += 1

    def check(self) -> None:
        """Raise the error that ended the request, if one did."""
        if self.error is not None:
            raise self.error

    def fail(self, error: APIError) -> None:
        """End the request: its streams raise `error`, and `check` does from now on."""
        if self.error is not None:
            return
        self.error = error
        if self.on_failure is not None:
            self.on_failure(error)
        Reservation.release(self)  # whoever holds it releases it, too
        for stream in list(self._streams):
            stream.fail(error)
        self._is_settled.set()

    async def wait_for_start(self, seconds: float) -> None:
        """Wait until the request has started, but at most `seconds`; the client gets the status 200 then.

        Raises the error that ended the request meanwhile.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_settled.wait()
        self.check()
        self.is_answered = True

    def _change_choices(self, count: int) -> None:
        self.num_choices += count
        assert self.num_choices >= self.count >= 0
        self._on_change(self, count)
        if not self.num_choices:
            self._is_settled.set()


@dataclass(frozen=True, slots=True)
class Backlog:
    """The work of a tenant that the engine has not begun with."""

    tokens: float
    weight: float  # of the tenant


@dataclass(slots=True)
class _Share:
    """The requests of one tenant that hold capacity, oldest first."""

    tenant: Tenant
    num_choices: int = 0
    requests: dict[Reservation, None] = field(default_factory=dict)

    def backlog(self) -> Backlog:
        """Return the work that the engine has not begun with."""
        return Backlog(sum(request.num_waiting_tokens for request in self.requests), self.tenant.weight)

    def waiting(self) -> list[Reservation]:
        """Return the requests that can make room. The last goes first: the newest of those without a status."""
        waiting = [request for request in self.requests if request.is_waiting]
        return sorted(waiting, key=lambda request: not request.is_answered)


class Shares:
    """The choices in flight, by tenant.

    A tenant may hold the whole capacity while nobody else needs it. When it is full, waiting requests of the largest
    holder make room for others, while it holds more than half of the capacity, or more than the other would, both in
    proportion to their weights. A request that the engine has begun with is never ended for another: if no other can
    make room, a tenant within its part by weight is admitted beyond the capacity, up to half of it more in all.
    """

    def __init__(self) -> None:
        self.num_choices = 0  # of all tenants
        self._by_tenant: dict[str, _Share] = {}

    def update(self, request: Reservation, change: int) -> None:
        """Note that a request holds `change` more choices than before."""
        share = self._by_tenant.setdefault(request.tenant.name, _Share(request.tenant))
        self.num_choices += change
        share.num_choices += change
        if request.num_choices:
            share.requests[request] = None
        else:
            share.requests.pop(request, None)
        if not share.requests:
            del self._by_tenant[request.tenant.name]

    def requests(self) -> list[Reservation]:
        """Return all requests that hold capacity."""
        return [request for share in self._by_tenant.values() for request in share.requests]

    def backlogs(self, tenant: Tenant) -> tuple[Backlog, list[Backlog]]:
        """Return the work of a tenant that the engine has not begun with, and that of each other tenant."""
        backlogs = {name: share.backlog() for name, share in self._by_tenant.items()}
        own = backlogs.pop(tenant.name, Backlog(0.0, tenant.weight))
        return own, list(backlogs.values())

    def make_room(self, tenant: Tenant, count: int, capacity: int) -> Sequence[Reservation] | None:
        """Return the requests to end so that a tenant's request of `count` choices can be admitted; None: refuse it."""
        if self.num_choices + count <= capacity:
            return ()
        own = self._by_tenant.get(tenant.name)
        after = count + (own.num_choices if own else 0)  # what the tenant would hold
        others = [share for share in self._by_tenant.values() if share is not own]
        part_of_one = capacity / (tenant.weight + sum(share.tenant.weight for share in others))
        rivals = [_Rival(share, max(capacity // 2, part_of_one * share.tenant.weight)) for share in others]
        part = part_of_one * tenant.weight
        is_modest = after <= max(capacity // 2, part)
        total = self.num_choices + count
        ended: list[Reservation] = []
        while total > capacity:
            rivals.sort(key=lambda rival: rival.load, reverse=True)
            debtors = [rival for rival in rivals if rival.owes(after / tenant.weight, is_modest=is_modest)]
            is_lent = after <= part and total <= capacity + capacity // 2
            if is_lent and not (debtors and debtors[0] is rivals[0]):
                break
            if not debtors:
                return None
            ended.append(debtors[0].pop())
            total -= ended[-1].num_choices
        return ended


class _Rival:
    """Another tenant's share, as it would be after some of its requests have made room."""

    def __init__(self, share: _Share, limit: float) -> None:
        """`limit` is what it may hold while others wait."""
        self._weight = share.tenant.weight
        self._limit = limit
        self._num_choices = share.num_choices
        self._waiting = share.waiting()

    @property
    def load(self) -> float:
        """The choices that it holds, in proportion to its weight."""
        return self._num_choices / self._weight

    def owes(self, load: float, *, is_modest: bool) -> bool:
        """Return whether its next request is to make room for a tenant that would then have this load.

        `is_modest`: the tenant would not exceed its own limit.
        """
        if not self._waiting:
            return False
        if is_modest and self._num_choices > self._limit:
            return True
        return load <= (self._num_choices - self._waiting[-1].num_choices) / self._weight

    def pop(self) -> Reservation:
        """Remove and return the request that makes room next."""
        request = self._waiting.pop()
        self._num_choices -= request.num_choices
        return request
