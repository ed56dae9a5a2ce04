"""Accepts connections, and starts a few of them at a time, in turn over the networks of the clients.

What makes a connection expensive is its protocol, and above all TLS. A network that opens thousands of connections
therefore waits for itself, while a client of another one comes next.
"""

import asyncio
import errno
import logging
import socket
from collections import deque
from collections.abc import Callable
from itertools import chain, count, islice
from typing import NamedTuple, Protocol

from server.context import Listening
from server.shares import giving_way
from server.tenants import network_of

logger = logging.getLogger(__name__)

ACCEPTS_AT_ONCE = 128  # between other events; takes 1 or 2 ms
STARTS_AT_ONCE = 4  # likewise; with TLS
RETRY_SECONDS = 1.0  # after which connections are accepted again where the system had no more files or memory
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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


class Handover(Protocol):
    """Other processes, which take connections."""

    @property
    def num_free(self) -> int: ...

    def assign(self, connection: socket.socket) -> socket.socket | None:
        """Give a connection to a process. Return it if this is the one."""

    def close(self) -> None: ...


class Acceptor:
    """Accepts the connections of listening sockets.

    When more connections wait to be started than `num_free` says there is room for, the longest waiting ones of the
    network that has most of them are closed. `workers` take their share of the connections, and have room of their own.
    """

    def __init__(self, listening: Listening, workers: Handover | None = None) -> None:
        self._listeners = listening.sockets
        self._starter = Starter(listening.make_protocol)
        self._workers = workers
        self._num_free = listening.num_free
        self._waiting = Waiting()
        self._loop = asyncio.get_running_loop()
        self._next_start: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Accept nothing more, and close what has not been started. The listening sockets stay open."""
        self._pause()
        for handle in (self._retry, self._next_start):
            if handle is not None:
                handle.cancel()
        self._waiting.shrink_to(0)
        if self._workers is not None:
            self._workers.close()

    async def wait_closed(self) -> None:
        """Wait until the connections that are being started are the protocols' own."""
        await self._starter.wait()

    def _listen(self) -> None:
        for listener in self._listeners:
            listener.setblocking(False)
            self._loop.add_reader(listener, self._accept, listener)

    def _pause(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                logger.error("a connection cannot be accepted: %s", error.strerror)
                if error.errno in EXHAUSTED:  # the listener would be ready again at once
                    self._pause()
                    self._retry = self._loop.call_later(RETRY_SECONDS, self._listen)
                break
            # Clients of UNIX sockets have no address.
            self._waiting.add(network_of(address[0]) if isinstance(address, tuple) else "", connection)
        num_free = self._num_free() + (self._workers.num_free if self._workers is not None else 0)
        self._waiting.shrink_to(max(ACCEPTS_AT_ONCE, num_free))
        if self._next_start is None:
            self._start_some()

    def _start_some(self) -> None:
        for _ in range(min(STARTS_AT_ONCE, len(self._waiting))):
            connection = self._waiting.take()
            own = connection if self._workers is None else self._workers.assign(connection)
            if own is not None:
                self._starter.start(own)
        self._next_start = self._loop.call_soon(self._start_some) if len(self._waiting) else None


class WaitingSocket(NamedTuple):
    """A socket that waits to be started, and the network of its client."""

    arrival: int
    network: str
    connection: socket.socket


class Waiting:
    """Sockets that wait to be started, in a queue for each network."""

    def __init__(self) -> None:
        self._of_network: dict[str, deque[WaitingSocket]] = {}  # the network whose turn it is first; no empty queues
        self._arrivals = count()
        self._num_sockets = 0

    def __len__(self) -> int:
        return self._num_sockets

    def add(self, network: str, connection: socket.socket) -> None:
        waiting = WaitingSocket(next(self._arrivals), network, connection)
        self._of_network.setdefault(network, deque()).append(waiting)
        self._num_sockets += 1

    def take(self) -> socket.socket:
        """Remove and return the longest waiting socket of the network whose turn it is."""
        network = next(iter(self._of_network))
        queue = self._of_network.pop(network)
        first = queue.popleft()
        if queue:
            self._of_network[network] = queue  # now the last one
        self._num_sockets -= 1
        return first.connection

    def shrink_to(self, max_sockets: int) -> None:
        """Close the longest waiting sockets of the network that has most, until there are no more than that."""
        excess = self._num_sockets - max_sockets
        if excess <= 0:
            return
        arrived = sorted(chain.from_iterable(self._of_network.values()))
        for _, network, connection in islice(giving_way(arrived, lambda waiting: waiting.network), excess):
            connection.close()
            self._of_network[network].popleft()
            if not self._of_network[network]:
                del self._of_network[network]
        self._num_sockets = max_sockets
