"""Connections whose protocol cannot be made. The tests of the acceptor and of the handover have the others."""

import asyncio
import socket

import pytest

from server.sockets.starter import Starter


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
        client.settimeout(5)
        assert client.recv(1) == b""
    (record,) = [record for record in caplog.records if record.name == "server.sockets.starter"]
    assert record.getMessage() == "a connection could not be started"
