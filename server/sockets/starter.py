"""Starts the protocols of accepted connections."""

import asyncio
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

STARTS_AT_ONCE = 4  # between other events; takes 1 or 2 ms with TLS


class Starter:
    """Starts a protocol for each connection."""

    def __init__(self, make_protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()

    def start(self, connection: socket.socket) -> None:
        task = self._loop.create_task(self._start(connection))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def wait(self) -> None:
        """Wait until the connections that are being started are the protocols' own."""
        await asyncio.gather(*self._starting)

    async def _start(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except Exception:
            logger.exception("a connection could not be started")
            connection.close()
