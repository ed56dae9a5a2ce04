"""Runs the CPU-bound work on the texts of requests in threads: rendering, tokenizing, encoding long answers."""

import asyncio
import math
import os
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import anyio.to_thread
from anyio import CapacityLimiter

from server.tenants import Tenant
from server.text.turns import Turns

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LONG_BYTES = 1 << 16  # of text
SECONDS_PER_BYTE = 0.03 / LONG_BYTES  # that tokenizing a text takes
MIN_BYTES = 1 << 10  # for which a shorter text counts
STUCK_SECONDS = 10.0  # without any progress with short texts


class TextThreads:
    """Threads in which tenants take turns, in proportion to the time that their texts take.

    Long texts have threads of their own, so that no request waits for a longer one of the same tenant either.
    """

    def __init__(self, num_cores: int | None = None) -> None:
        """`num_cores` is by default that of the machine."""
        num_short = num_cores or os.cpu_count() or 1
        num_long = max(1, num_short // 2)
        self._short, self._long = Turns(num_short), Turns(num_long)
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
        turns, expected = self._long if is_long else self._short, max(num_bytes, MIN_BYTES) * SECONDS_PER_BYTE
        start = await turns.acquire(tenant, expected)
        if not is_long:
            self._short_work[work] = loop.time()
        try:
            return await anyio.to_thread.run_sync(function, *args, limiter=self._threads)
        finally:
            turns.release(tenant, expected, start)
            if not is_long:
                del self._short_work[work]
                self._last_end = loop.time()
