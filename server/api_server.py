"""The HTTP server of an API process: uvicorn, as it is or as a part of the server makes it."""

import asyncio
import contextlib
import resource
from collections.abc import Iterator

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
