"""The HTTP server of an API process: uvicorn, as it is or as a part of the server makes it."""

import asyncio
import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from server.context import ServerContext

CLOSE_TIMEOUT = 2  # seconds for connections to receive their last bytes
KEEP_ALIVE = 75  # seconds; longer than load balancers keep idle connections open (often 60)
MAX_CONNECTIONS = 4096
SPARE_FILES = 640  # file descriptors for everything but connections, and for those that are not yet started
TICK = 1.0  # seconds between updates of the Date header


class APIServer(uvicorn.Server):
    """uvicorn without its signal handlers, which re-raise the signal at the end, and with fewer wake-ups when idle."""

    def __init__(self, app: ASGIApp, context: ServerContext, max_connections: int) -> None:
        trusted = list(context.settings.forwarded_allow_ips)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted),
            forwarded_allow_ips=trusted,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
            limit_concurrency=max_connections,
        )
        config.load()
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Update the Date header every second until `stop`. uvicorn's own loop wakes up ten times a second."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), TICK)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def raise_file_limit(num_processes: int = 1) -> int:
    """Raise the soft limit of open files as far as needed and allowed. Return the number of connections it allows.

    With several API processes, this is that of each: the coordinator may hold the connections of all, until it has
    passed them on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_processes * MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(16, min(MAX_CONNECTIONS, (soft - SPARE_FILES) // num_processes))


THRESHOLDS = (700, 10, 4)  # a full collection after 5 x 11 x 700 new containers
MAX_GROWTH = 500_000  # survivors
MAX_GROWTH_BYTES = 64 << 20  # of the process: a few survivors may hold much text
PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def collect_in_steps(max_growth: int = MAX_GROWTH, max_growth_bytes: int = MAX_GROWTH_BYTES) -> None:
    """Let each full collection leave out what has survived one before.

    Most of that is freed without the collector. So that garbage in it does not add up, everything is collected when
    there are `max_growth` more survivors, or `max_growth_bytes` more memory is in use, than the last time.
    """
    limit, limit_bytes = gc.get_freeze_count() + max_growth, resident_bytes() + max_growth_bytes
    is_complete = False  # whether the next full collection goes over everything

    def on_collection(phase: str, info: dict[str, Any]) -> None:
        nonlocal limit, limit_bytes, is_complete
        if phase != "stop" or info["generation"] != 2:
            return
        if not is_complete and (gc.get_freeze_count() > limit or resident_bytes() > limit_bytes):
            gc.unfreeze()
            is_complete = True
            return
        gc.freeze()
        if is_complete:
            limit, limit_bytes = gc.get_freeze_count() + max_growth, resident_bytes() + max_growth_bytes
            is_complete = False

    gc.callbacks.append(on_collection)
    gc.set_threshold(*THRESHOLDS)
