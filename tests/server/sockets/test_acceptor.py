"""Floods of connections, over real sockets: whose turn it is, and which ones are closed."""

import asyncio
import errno
import os
import select
import socket
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest

from server.sockets import acceptor
from server.sockets.acceptor import Acceptor, Waiting
from server.sockets.listeners import bind
from server.sockets.starter import Starter
from tests.support.serving import is_closed
from tests.support.turned_loop import TurnedLoop, turn

T = TypeVar("T")

FLOOD, OTHER = "127.0.0.1", "127.0.0.3"


class Started(asyncio.Protocol):
    """Records its transport."""

    def __init__(self, transports: list[asyncio.Transport]) -> None:
        self._transports = transports

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transports.append(transport)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    (listener,) = bind("127.0.0.1", 0)
    with listener:
        yield listener


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=TurnedLoop) as runner:
        return runner.run(work)


def connect(stack: ExitStack, listener: socket.socket, address: str) -> socket.socket:
    return stack.enter_context(socket.create_connection(listener.getsockname(), source_address=(address, 0)))


async def accept_all(listener: socket.socket, num_free: int = 1000) -> list[tuple[str, int]]:
    """Return the addresses of the clients whose connections are started, in that order."""
    transports: list[asyncio.Transport] = []
    accepting = Acceptor([listener], lambda: Started(transports), num_free=lambda: num_free)
    while select.select([listener], [], [], 0)[0] or accepting._waiting:
        await turn(acceptor.RETRY_SECONDS)
    await close_all(accepting, transports)
    return [transport.get_extra_info("peername") for transport in transports]


async def close_all(accepting: Acceptor, transports: list[asyncio.Transport]) -> None:
    accepting.close()
    await accepting.wait_closed()
    for transport in transports:
        transport.abort()
    await asyncio.sleep(0)


@pytest.mark.checklist("A16")
def test_another_network_is_next(listener: socket.socket) -> None:
    with ExitStack() as stack:
        flood = [connect(stack, listener, FLOOD) for _ in range(60)]
        other = connect(stack, listener, OTHER)
        started = run(accept_all(listener))
        assert other.getsockname() in started[:2]
        assert [each for each in started if each[0] == FLOOD] == [each.getsockname() for each in flood]


@pytest.mark.checklist("A16")
def test_what_there_is_no_room_for_is_closed(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest waiting ones of the network that has most."""
    monkeypatch.setattr(acceptor, "ACCEPTS_AT_ONCE", 40)
    monkeypatch.setattr(acceptor, "STARTS_AT_ONCE", 1)
    with ExitStack() as stack:
        other = [connect(stack, listener, OTHER) for _ in range(3)]
        flood = [connect(stack, listener, FLOOD) for _ in range(200)]
        started = run(accept_all(listener, num_free=0))
        assert {each.getsockname() for each in other} <= set(started)
        assert flood[-1].getsockname() in started
        assert 40 < len(started) < 60


@pytest.mark.checklist("A16")
def test_of_networks_that_have_as_many_the_longest_waiting_connection_is_closed() -> None:
    """Whatever the networks are called."""
    waiting = Waiting()
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(10)]
        for number, each in enumerate(sockets):
            waiting.add(f"network {9 - number}", each)
        waiting.shrink_to(4)
        assert [each.fileno() == -1 for each in sockets] == [True] * 6 + [False] * 4
        assert [waiting.take() for _ in range(len(waiting))] == sockets[6:]


def test_connections_that_wait_are_closed_at_the_end(listener: socket.socket) -> None:
    async def accept_and_close() -> None:
        transports: list[asyncio.Transport] = []
        accepting = Acceptor([listener], lambda: Started(transports), num_free=lambda: 1000)
        for _ in range(2):
            await asyncio.sleep(0)
        await close_all(accepting, transports)
        assert len(transports) < 20

    with ExitStack() as stack:
        connections = [connect(stack, listener, FLOOD) for _ in range(20)]
        run(accept_and_close())
        for connection in connections:
            connection.settimeout(60)
            assert is_closed(connection)


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
def test_accepting_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    monkeypatch.setattr(Failing, "error", error)
    with ExitStack() as stack:
        listener = stack.enter_context(Failing(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        connections = [connect(stack, listener, FLOOD) for _ in range(2)]
        assert run(accept_all(listener)) == [each.getsockname() for each in connections]
    assert [record.getMessage() for record in caplog.records] == [
        f"a connection cannot be accepted: {os.strerror(error)}"
    ]


# A connection whose protocol cannot be made.


def test_a_connection_that_cannot_be_started_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> asyncio.BaseProtocol:
        raise ValueError("a bug")

    async def start(connection: socket.socket) -> None:
        starter = Starter(fail)
        starter.start(connection)
        await starter.wait()

    client, connection = socket.socketpair()
    with client, connection:
        asyncio.run(start(connection))
        client.settimeout(60)
        assert client.recv(1) == b""
    (record,) = [record for record in caplog.records if record.name == "server.sockets.starter"]
    assert record.getMessage() == "a connection could not be started"
