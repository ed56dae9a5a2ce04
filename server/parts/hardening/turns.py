"""Threads for the work on texts in which tenants take turns, in proportion to the time that their texts take."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import anyio.to_thread
from anyio import CapacityLimiter

from server.tenants import Tenant
from server.text.text_threads import LONG_BYTES, TextThreads

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SECONDS_PER_BYTE = 0.03 / LONG_BYTES  # that tokenizing a text takes
MIN_BYTES = 1 << 10  # for which a shorter text counts
MAX_IDLE_TENANTS = 1024  # of which it is known what they have had while others wait
STUCK_SECONDS = 10.0  # without any progress with short texts


class Turns:
    """A semaphore whose free slots go to the waiting tenant that has had the least of it, relative to its weight.

    This is start-time fair queueing. What a tenant has had counts from when it begins to wait, so that nobody saves up
    turns by being idle. Work of one tenant is done in the order in which it came. For one event loop.

    A turn costs the seconds for which it holds its slot. Until it ends, it counts as what is expected of it.
    """

    def __init__(self, num_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_slots = num_slots
        self._clock = clock
        self._num_free = num_slots
        self._waiting: dict[str, dict[asyncio.Future[None], float]] = {}  # by tenant, what each costs; never empty
        self._had: dict[str, float] = {}  # virtual time up to which a tenant has been served
        self._now = 0.0  # virtual time: that of the tenant that was served last

    async def acquire(self, tenant: Tenant, expected: float) -> float:
        """Wait for a slot, and return the time when it was granted. `release` must follow with the same arguments.

        `expected` is the time that the work probably takes, in seconds.
        """
        name, cost = tenant.name, expected / tenant.weight
        if name not in self._waiting:
            if len(self._had) > MAX_IDLE_TENANTS:
                self._had = {name: had for name, had in self._had.items() if name in self._waiting}
            self._had[name] = max(self._had.get(name, 0.0), self._now)
        if self._num_free and not self._waiting:
            self._num_free -= 1
            self._now = self._had[name]
            self._had[name] += cost
        else:
            await self._wait(name, cost)
        return self._clock()

    def release(self, tenant: Tenant, expected: float, start: float) -> None:
        """Return a slot that was granted at the time `start`."""
        seconds = self._clock() - start - expected
        self._had[tenant.name] = max(self._had.get(tenant.name, 0.0), self._now) + seconds / tenant.weight
        self._free()

    async def _wait(self, name: str, cost: float) -> None:
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, {})[granted] = cost
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._remove(name, granted)
            else:  # it was cancelled after its turn had come
                self._free()
            raise

    def _free(self) -> None:
        self._num_free += 1
        if self._waiting:
            self._grant()
        if self._num_free == self._num_slots:  # nobody waits, so nobody is owed anything
            self._had.clear()

    def _grant(self) -> None:
        """Give the free slots to those who wait."""
        while self._num_free and self._waiting:
            name = min(self._waiting, key=self._had.__getitem__)
            granted, cost = next(iter(self._waiting[name].items()))
            if not granted.done():  # else it was cancelled
                self._num_free -= 1
                self._now = self._had[name]
                self._had[name] += cost
                granted.set_result(None)
            self._remove(name, granted)

    def _remove(self, name: str, granted: asyncio.Future[None]) -> None:
        """Remove one who waits. Does nothing if it is not there."""
        waiting = self._waiting.get(name, {})
        waiting.pop(granted, None)
        if not waiting:
            self._waiting.pop(name, None)


class FairThreads(TextThreads):
    """Threads in which tenants take turns."""

    def __init__(self, num_cores: int | None = None) -> None:
        """`num_cores` is by default that of the machine."""
        num_short = num_cores or os.cpu_count() or 1
        num_long = max(1, num_short // 2)
        self._short_turns, self._long_turns = Turns(num_short), Turns(num_long)
        self._threads = CapacityLimiter(num_short + num_long)
        self._short_work: dict[object, float] = {}  # what runs -> when it began, by the event loop's clock
        self._last_end = 0.0  # of short work

    @property
    def is_stuck(self) -> bool:
        """True if there is work on short texts, none of which has been finished for `STUCK_SECONDS`."""
        since = max(self._last_end, min(self._short_work.values(), default=math.inf))
        return asyncio.get_running_loop().time() - since > STUCK_SECONDS

    async def run(self, tenant: Tenant, num_bytes: int, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which works on `num_bytes` of text, when it is the tenant's turn."""
        is_long, work, loop = num_bytes > LONG_BYTES, object(), asyncio.get_running_loop()
        turns = self._long_turns if is_long else self._short_turns
        expected = max(num_bytes, MIN_BYTES) * SECONDS_PER_BYTE
        start = await turns.acquire(tenant, expected)
        if not is_long:
            self._short_work[work] = loop.time()

        def end(ended: asyncio.Future[T]) -> None:
            if not ended.cancelled():
                ended.exception()  # that of a request whose client has gone is of interest to nobody
            turns.release(tenant, expected, start)
            if not is_long:
                del self._short_work[work]
                self._last_end = loop.time()

        running = asyncio.ensure_future(anyio.to_thread.run_sync(function, *args, limiter=self._threads))
        running.add_done_callback(end)
        return await asyncio.shield(running)  # if the request is cancelled, the thread goes on and holds its turn
