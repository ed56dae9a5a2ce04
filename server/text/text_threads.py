"""Runs the CPU-bound work on the texts of requests in threads."""

import os
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import anyio.to_thread
from anyio import CapacityLimiter

from server.tenants import Tenant

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LONG_BYTES = 1 << 16  # of text


class TextThreads:
    """Threads, of which long texts have their own, so that no request waits for a longer one."""

    def __init__(self, num_cores: int | None = None) -> None:
        """`num_cores` is by default that of the machine."""
        num_short = num_cores or os.cpu_count() or 1
        self._short, self._long = CapacityLimiter(num_short), CapacityLimiter(max(1, num_short // 2))

    @property
    def is_stuck(self) -> bool:
        """True if work makes no progress, as far as that is known."""
        return False

    async def run(self, tenant: Tenant, num_bytes: int, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which works on `num_bytes` of a tenant's text."""
        limiter = self._long if num_bytes > LONG_BYTES else self._short
        return await anyio.to_thread.run_sync(function, *args, limiter=limiter)
