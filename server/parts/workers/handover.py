"""Hands accepted connections over to the other API processes, the workers.

The coordinator accepts all connections, and has a pair of sockets with each worker. Over it go the connections, each
with a message of one byte. Back come the numbers of connections that have been closed since the last message; the first
message says that the worker has started.
"""

import asyncio
import logging
import socket
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress

from server.parts.hardening.acceptor import STARTS_AT_ONCE, Starter

logger = logging.getLogger(__name__)

# Memory for some 20 connections that a worker has not received. A busy worker gets no more, so that they need not wait.
QUEUE_BYTES = 8 << 10
NUMBER_BYTES = 4
# What a stream of a worker costs the coordinator, of what one of its own does (tests/bench/capacity.py).
RELAY_COST = 1 / 6


class CountedSocket(socket.socket):
    """The socket of a connection. `on_close` is called once, when it is closed."""

    def __init__(self, fd: int, on_close: Callable[[], None]) -> None:
        super().__init__(fileno=fd)
        self._on_close = on_close

    def close(self) -> None:
        is_open = self.fileno() != -1
        super().close()
        if is_open:
            self._on_close()


class Workers:
    """The workers, as the coordinator sees them, and the connections that it keeps for itself."""

    def __init__(self, ends: Iterable[socket.socket], max_connections: int, relay_cost: float = RELAY_COST) -> None:
        """Each end leads to a worker, which has room for `max_connections`."""
        self.stopped = asyncio.Event()  # no worker takes connections any more
        self._workers = [Worker(end, self._on_stop) for end in ends]
        self._max_connections = max_connections
        self._relay_cost = relay_cost
        self._num_own = 0

    def assign(self, connection: socket.socket) -> socket.socket | None:
        """Give a connection to the process that has least to do. Return it if this is the one, and None otherwise.

        Connections of workers cost this process something, too.
        """
        running = [worker for worker in self._workers if worker.is_running]
        own_load = self._num_own + self._relay_cost * sum(worker.num_open for worker in running)
        candidates = [worker for worker in running if worker.num_open <= min(own_load, self._max_connections - 1)]
        if any(worker.send(connection) for worker in sorted(candidates, key=lambda worker: worker.num_open)):
            return None
        self._num_own += 1
        return CountedSocket(connection.detach(), self._on_close)

    @property
    def num_free(self) -> int:
        """Number of connections that the workers have room for."""
        return sum(self._max_connections - worker.num_open for worker in self._workers if worker.is_running)

    def close(self) -> None:
        """Pass on nothing more."""
        for worker in self._workers:
            worker.close()

    def _on_close(self) -> None:
        self._num_own -= 1

    def _on_stop(self) -> None:
        if all(worker.has_stopped for worker in self._workers):
            self.stopped.set()


class Worker:
    """A worker, as the coordinator sees it."""

    def __init__(self, end: socket.socket, on_stop: Callable[[], None]) -> None:
        """`on_stop` is called when it takes no more connections."""
        self.num_open = 0  # connections that were sent to it and are not known to be closed
        self.is_running = False
        self._end = end
        self._on_stop = on_stop
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE_BYTES)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(end, self._read)

    def send(self, connection: socket.socket) -> bool:
        """Send a connection, and close it here. Return False if the worker cannot take it: it is busy, or has ended."""
        try:
            socket.send_fds(self._end, [b"\0"], [connection.fileno()])
        except OSError:
            return False
        connection.close()
        self.num_open += 1
        return True

    @property
    def has_stopped(self) -> bool:
        return self._end.fileno() == -1

    def close(self) -> None:
        """Send nothing more."""
        if not self.has_stopped:
            self.is_running = False
            self._loop.remove_reader(self._end)
            self._end.close()
            self._on_stop()

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while number := self._receive():
                self.is_running = True
                self.num_open -= int.from_bytes(number)
            self.close()

    def _receive(self) -> bytes:
        with suppress(ConnectionError):
            return self._end.recv(NUMBER_BYTES)
        return b""


class Receiver:
    """Starts the connections that the coordinator sends to this process, and reports those that have been closed."""

    def __init__(self, end: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._end = end
        end.setblocking(False)
        self._starter = Starter(make_protocol)
        self._num_unreported = 0  # closed connections
        self._loop = asyncio.get_running_loop()

    def open(self) -> None:
        """Ask the coordinator for connections."""
        self._loop.add_reader(self._end, self._receive_some)
        self._report()

    def close(self) -> None:
        """Receive nothing more. The coordinator notices it when the connections have ended."""
        if self._end.fileno() != -1:
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)
            self._end.shutdown(socket.SHUT_RD)

    async def wait_closed(self) -> None:
        """Wait until the connections that are being started are the protocols' own."""
        await self._starter.wait()
        self._end.close()

    def _receive_some(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(STARTS_AT_ONCE):
                if not self._receive():
                    self._loop.remove_reader(self._end)
                    break

    def _receive(self) -> bool:
        """Receive a connection. Return False if the coordinator sends no more."""
        fds = array("i")
        try:
            message, controls, *_ = self._end.recvmsg(1, socket.CMSG_LEN(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        for _, _, data in controls:
            fds.frombytes(data)
        for fd in fds:
            self._starter.start(CountedSocket(fd, self._on_close))
        if message and not fds:
            logger.error("a connection cannot be received: too many open files")
            self._on_close()
        return bool(message)

    def _on_close(self) -> None:
        self._num_unreported += 1
        self._report()

    def _report(self) -> None:
        """Report the closed connections, now or as soon as the coordinator has read earlier reports."""
        if self._end.fileno() == -1:
            return
        self._loop.remove_writer(self._end)
        try:
            self._end.send(self._num_unreported.to_bytes(NUMBER_BYTES))
            self._num_unreported = 0
        except BlockingIOError:
            self._loop.add_writer(self._end, self._report)
        except ConnectionError:  # the coordinator receives nothing more
            pass
