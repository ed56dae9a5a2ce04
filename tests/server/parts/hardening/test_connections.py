"""Accepted connections, over real sockets: whose turn it is, which are closed, and which go to other processes."""

import asyncio
import errno
import os
import resource
import select
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from server.context import Listening
from server.parts.hardening import acceptor
from server.parts.hardening.acceptor import Acceptor, Starter, Waiting
from server.parts.workers.handover import NUMBER_BYTES, RELAY_COST, Receiver, Workers
from server.sockets import bind, bind_unix
from tests.support.engine_clients import until
from tests.support.serving import is_closed
from tests.support.turned_loop import turn

pytestmark = pytest.mark.anyio

FLOOD, OTHER = "127.0.0.1", "127.0.0.3"


class Echo(asyncio.Protocol):
    """Sends back what it receives, and is in a list while it is open."""

    def __init__(self, connections: list["Echo"]) -> None:
        self._connections = connections
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._connections.append(self)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def tcp_listener(stack: ExitStack) -> socket.socket:
    return stack.enter_context(bind("127.0.0.1", 0)[0])


def connect_from(stack: ExitStack, listener: socket.socket, address: str) -> socket.socket:
    return stack.enter_context(socket.create_connection(listener.getsockname(), 60, (address, 0)))


async def accept_all(listener: socket.socket, num_free: int = 1000) -> list[tuple[str, int]]:
    """Return the addresses of the clients whose connections are started, in that order."""
    connections: list[Echo] = []
    accepting = Acceptor(Listening([listener], lambda: Echo(connections), lambda: num_free, 1000))
    while select.select([listener], [], [], 0)[0] or accepting._waiting:
        await turn(acceptor.RETRY_SECONDS)
    await turn(0)  # the last ones are started
    addresses = [each.transport.get_extra_info("peername") for each in connections]
    await close_all(accepting, connections)
    return addresses


async def close_all(accepting: Acceptor | Receiver, connections: list[Echo]) -> None:
    accepting.close()
    await accepting.wait_closed()
    for each in connections:
        each.transport.abort()
    await until(lambda: not connections)


@pytest.mark.checklist("A16")
async def test_another_network_is_next(tcp_listener: socket.socket, stack: ExitStack) -> None:
    flood = [connect_from(stack, tcp_listener, FLOOD) for _ in range(60)]
    other = connect_from(stack, tcp_listener, OTHER)
    started = await accept_all(tcp_listener)
    assert other.getsockname() in started[:2]
    assert [each for each in started if each[0] == FLOOD] == [each.getsockname() for each in flood]


@pytest.mark.checklist("A16")
async def test_what_there_is_no_room_for_is_closed(
    tcp_listener: socket.socket, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest waiting ones of the network that has most."""
    monkeypatch.setattr(acceptor, "ACCEPTS_AT_ONCE", 40)
    monkeypatch.setattr(acceptor, "STARTS_AT_ONCE", 1)
    other = [connect_from(stack, tcp_listener, OTHER) for _ in range(3)]
    flood = [connect_from(stack, tcp_listener, FLOOD) for _ in range(200)]
    started = await accept_all(tcp_listener, num_free=0)
    assert {each.getsockname() for each in (*other, flood[-1])} <= set(started)
    assert 40 < len(started) < 60


@pytest.mark.checklist("A16")
def test_of_networks_that_have_as_many_the_longest_waiting_connection_is_closed(stack: ExitStack) -> None:
    """Whatever the networks are called."""
    waiting = Waiting()
    sockets = [stack.enter_context(socket.socket()) for _ in range(10)]
    for number, each in enumerate(sockets):
        waiting.add(f"network {9 - number}", each)
    waiting.shrink_to(4)
    assert [each.fileno() == -1 for each in sockets] == [True] * 6 + [False] * 4
    assert [waiting.take() for _ in range(len(waiting))] == sockets[6:]


async def test_connections_that_wait_are_closed_at_the_end(tcp_listener: socket.socket, stack: ExitStack) -> None:
    clients = [connect_from(stack, tcp_listener, FLOOD) for _ in range(20)]
    started: list[Echo] = []
    accepting = Acceptor(Listening([tcp_listener], lambda: Echo(started), lambda: 1000, 1000))
    for _ in range(2):
        await asyncio.sleep(0)
    accepting.close()
    await accepting.wait_closed()
    assert len(started) < 20
    await close_all(accepting, started)
    assert all(map(is_closed, clients))


class Failing(socket.socket):
    """A listening socket that fails to accept the second connection at first."""

    error = errno.EMFILE
    num_calls = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.num_calls += 1
        if self.num_calls == 2:
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EPERM, errno.EPROTO])
async def test_accepting_goes_on_after_an_error(stack: ExitStack, caplog: pytest.LogCaptureFixture, error: int) -> None:
    listener = stack.enter_context(Failing(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
    listener.error = error
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    clients = [connect_from(stack, listener, FLOOD) for _ in range(2)]
    assert await accept_all(listener) == [each.getsockname() for each in clients]
    messages = [record.message for record in caplog.records if record.name == acceptor.__name__]
    assert messages == [f"a connection cannot be accepted: {os.strerror(error)}"]


async def test_a_connection_that_cannot_start_is_closed(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """Since its protocol cannot be made."""
    client, connection = map(stack.enter_context, socket.socketpair())
    client.settimeout(60)
    starter = Starter(Mock(side_effect=ValueError("a bug")))
    starter.start(connection)
    await starter.wait()
    assert is_closed(client)
    assert "a connection could not be started" in caplog.messages


# Connections that are passed on to other processes: who gets which, and what is counted.


ROOM = 1000
HAS_STARTED = bytes(NUMBER_BYTES)

Connect = Callable[[], socket.socket]


async def check_echo(clients: list[socket.socket]) -> None:
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
        assert await asyncio.to_thread(client.recv, 10) == b"%d" % number


async def until_open(connections: list[Echo], number: int) -> None:
    await until(lambda: len(connections) == number)


@pytest.fixture(params=["tcp", "unix"])
def listener(request: pytest.FixtureRequest, stack: ExitStack, tmp_path: Path) -> socket.socket:
    """A listening socket."""
    if request.param == "unix":
        return stack.enter_context(bind_unix(str(tmp_path / "socket")))
    return stack.enter_context(bind("127.0.0.1", 0)[0])


@pytest.fixture
def connect(listener: socket.socket, stack: ExitStack) -> Connect:
    """A function that opens a connection to `listener`."""

    def connect() -> socket.socket:
        connection = stack.enter_context(socket.socket(listener.family, socket.SOCK_STREAM))
        connection.settimeout(60)
        connection.connect(listener.getsockname())
        return connection

    return connect


def pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return the coordinator's end and the worker's."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return stack.enter_context(first), stack.enter_context(second)


class Coordinator:
    """An acceptor with its workers, and the connections that it keeps."""

    def __init__(
        self, listener: socket.socket, ends: Sequence[socket.socket], num_free: int = ROOM, relay_cost: float = 0.0
    ) -> None:
        self.own: list[Echo] = []
        self.workers = Workers(ends, ROOM, relay_cost)
        self._num_ends = len(ends)
        self.acceptor = Acceptor(Listening([listener], lambda: Echo(self.own), lambda: num_free, 1000), self.workers)

    @property
    def num_passed_on(self) -> int:
        """Number of open connections of all workers."""
        return self._num_ends * ROOM - self.workers.num_free

    async def until_passed_on(self, number: int) -> None:
        await until(lambda: self.num_passed_on == number)

    async def close(self) -> None:
        await close_all(self.acceptor, self.own)


class Worker:
    """A receiver, and the connections that it has."""

    def __init__(self, end: socket.socket) -> None:
        self.own: list[Echo] = []
        self.receiver = Receiver(end, lambda: Echo(self.own))
        self.receiver.open()

    async def close(self) -> None:
        await close_all(self.receiver, self.own)


@asynccontextmanager
async def running(
    listener: socket.socket, num_workers: int, num_free: int = ROOM, relay_cost: float = 0.0
) -> AsyncIterator[tuple[Coordinator, list[Worker]]]:
    """Run a coordinator with workers, which have started."""
    with ExitStack() as stack:
        pairs = [pair(stack) for _ in range(num_workers)]
        coordinator = Coordinator(listener, [first for first, _ in pairs], num_free, relay_cost)
        workers = [Worker(second) for _, second in pairs]
        await until(lambda: coordinator.workers.num_free == num_workers * ROOM)
        yield coordinator, workers
        await coordinator.close()
        for worker in workers:
            await worker.close()


@pytest.mark.parametrize(
    ("num_workers", "relay_cost", "shares"),
    [(3, 0, [10] * 4), (1, RELAY_COST, [5, 7]), (3, RELAY_COST, [6, 12, 11, 11]), (7, RELAY_COST, [0] + 7 * [10])],
)
async def test_the_coordinator_keeps_fewer_the_more_it_works_for_the_streams_of_all(
    listener: socket.socket, connect: Connect, num_workers: int, relay_cost: float, shares: list[int]
) -> None:
    async with running(listener, num_workers, relay_cost=relay_cost) as (coordinator, workers):
        processes = [coordinator.own, *(worker.own for worker in workers)]
        clients = []
        for number in range(sum(shares)):
            clients.append(connect())
            await until(lambda: sum(map(len, processes)) == number + 1)  # noqa: B023  (used at once)
        assert list(map(len, processes)) == shares
        assert coordinator.num_passed_on == sum(shares[1:])
        await check_echo(clients)
        for connection in workers[0].own:
            passed_on = connection.transport.get_extra_info("socket")
            assert not os.get_inheritable(passed_on.fileno())
            if listener.family == socket.AF_INET:  # small writes are not delayed
                assert passed_on.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert connection.transport.get_extra_info("peername") in [each.getsockname() for each in clients]


async def test_the_next_connection_goes_where_some_have_been_closed(listener: socket.socket, connect: Connect) -> None:
    async with running(listener, 2) as (coordinator, workers):
        processes = [coordinator.own, *(worker.own for worker in workers)]
        for _ in range(12):
            connect()
        await until(lambda: list(map(len, processes)) == [4, 4, 4])
        for process in (2, 0, 1):
            for connection in processes[process]:
                connection.transport.close()
            await until_open(processes[process], 0)
            await coordinator.until_passed_on(8 if process == 0 else 4)
            for _ in range(4):
                connect()
            await until(lambda: list(map(len, processes)) == [4, 4, 4])


async def test_a_worker_gets_nothing_before_it_has_started_and_a_few_while_it_is_busy(
    listener: socket.socket, connect: Connect, stack: ExitStack
) -> None:
    """The coordinator has the others. When the worker is no longer busy, it has what it was sent."""
    end, other_end = pair(stack)
    coordinator = Coordinator(listener, [end])
    clients = [connect() for _ in range(3)]
    await until_open(coordinator.own, 3)
    assert coordinator.workers.num_free == 0
    other_end.send(HAS_STARTED)
    await coordinator.until_passed_on(0)
    clients += [connect() for _ in range(197)]
    await until(lambda: len(coordinator.own) + coordinator.num_passed_on == 200)
    num_waiting = coordinator.num_passed_on
    assert 0 < num_waiting < 80
    worker = Worker(other_end)
    await until_open(worker.own, num_waiting)
    await check_echo(clients)
    await coordinator.close()
    await worker.close()


async def test_the_room_of_workers_counts(
    listener: socket.socket, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections wait for it. Without it, all but some are closed."""
    monkeypatch.setattr(acceptor, "ACCEPTS_AT_ONCE", 20)
    monkeypatch.setattr(acceptor, "STARTS_AT_ONCE", 1)
    async with running(listener, 1, num_free=0) as (coordinator, (worker,)):
        clients = [connect() for _ in range(100)]
        await until(lambda: len(coordinator.own) == len(worker.own) == 50)
        await check_echo(clients)


async def test_a_dead_worker_gets_nothing(listener: socket.socket, connect: Connect, stack: ExitStack) -> None:
    """What it had is closed, and counts no longer."""
    end, other_end = pair(stack)
    coordinator = Coordinator(listener, [end])
    other_end.send(HAS_STARTED)
    await coordinator.until_passed_on(0)
    clients = [connect() for _ in range(4)]
    await until(lambda: len(coordinator.own) == coordinator.num_passed_on == 2)
    other_end.close()  # as the system does at the end of a process
    await until(lambda: coordinator.workers.num_free == 0)
    kept = [connection.transport.get_extra_info("peername") for connection in coordinator.own]
    if listener.family == socket.AF_INET:
        assert all(is_closed(client) for client in clients if client.getsockname() not in kept)
    for _ in range(6):
        connect()
    await until_open(coordinator.own, 8)
    await coordinator.close()


async def test_workers_get_nothing_after_the_end(listener: socket.socket, connect: Connect) -> None:
    async with running(listener, 1) as (coordinator, (worker,)):
        first = connect()
        await until_open(worker.own, 1)
        coordinator.acceptor.close()
        connect()
        for _ in range(10):  # turns of the loop, each of which looks at all sockets
            await asyncio.sleep(0)
        assert (len(worker.own), len(coordinator.own)) == (1, 0)
        await check_echo([first])  # goes on
        first.close()
        await until_open(worker.own, 0)


async def test_a_worker_that_has_stopped_gets_nothing(listener: socket.socket, connect: Connect) -> None:
    async with running(listener, 2) as (coordinator, (first, second)):
        first.receiver.close()
        for _ in range(4):
            connect()
        await until(lambda: len(coordinator.own) == len(second.own) == 2)
        assert first.own == []
        assert coordinator.workers.num_free == 2 * ROOM - 2
        await first.close()
        await until(lambda: coordinator.workers.num_free == ROOM - 2)
        assert not coordinator.workers.stopped.is_set()
        await second.close()
        await asyncio.wait_for(coordinator.workers.stopped.wait(), 20)


def numbers(end: socket.socket) -> list[int]:
    """Return the numbers of closed connections that were reported."""
    found = []
    while True:
        try:
            found.append(int.from_bytes(end.recv(NUMBER_BYTES)))
        except BlockingIOError:
            return found


async def test_closed_connections_are_reported_when_the_coordinator_is_busy(stack: ExitStack) -> None:
    end, other_end = pair(stack)
    end.setblocking(False)
    other_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    worker = Worker(other_end)
    clients = []
    for number in range(50):
        client, passed_on = map(stack.enter_context, socket.socketpair())
        clients.append(client)
        socket.send_fds(end, [b"\0"], [passed_on.fileno()])
        passed_on.close()
        await until_open(worker.own, number + 1)
    for number, client in enumerate(clients):
        client.close()
        await until_open(worker.own, 49 - number)
    reported = numbers(end)
    assert len(reported) < 50
    while sum(reported) < 50:
        await asyncio.sleep(0)
        reported += numbers(end)
    assert sum(reported) == 50
    assert len(reported) < 50
    await worker.close()


async def test_a_worker_without_file_descriptors(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """It closes the connection, and has room for the next one."""
    end, other_end = pair(stack)
    end.setblocking(False)
    worker = Worker(other_end)
    connections = [tuple(map(stack.enter_context, socket.socketpair())) for _ in range(2)]
    await asyncio.sleep(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_fd = os.dup(end.fileno())
    os.close(next_fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_fd, hard))
    try:
        client, passed_on = connections[0]
        socket.send_fds(end, [b"\0"], [passed_on.fileno()])
        await until(lambda: bool(caplog.records))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    passed_on.close()
    assert is_closed(client)
    assert numbers(end) == [0, 1]
    socket.send_fds(end, [b"\0"], [connections[1][1].fileno()])
    await until_open(worker.own, 1)
    await worker.close()
    assert caplog.messages == ["a connection cannot be received: too many open files"]
