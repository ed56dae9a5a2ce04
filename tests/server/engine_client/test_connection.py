"""The connection to an engine: what has arrived is read, whatever happens to what is sent."""

import asyncio
from typing import Any

import pytest

from engine.shared.messages import Abort, Hello
from server.engine_client.connected_engine import EngineConnection
from server.parts.workers.messages import Release
from server.parts.workers.relay import WorkerConnection
from tests.support.serving import own_address

pytestmark = pytest.mark.anyio


async def test_messages_that_arrived_before_the_other_end_left_are_read() -> None:
    """Sending to nobody uses up ZeroMQ's event of these messages."""
    received = asyncio.Queue[Any]()
    with own_address() as address:
        bound, other = WorkerConnection(address), EngineConnection(address)
        bound.open(received.put_nowait, lambda: None)
        other.open(lambda message: None, lambda: None)
        other.send(Hello())
        assert isinstance(await received.get(), Hello)
        other.send(Release(1))  # type: ignore[arg-type]
        assert other._socket is not None
        other._socket.linger = 60_000  # send what is queued
        other.close()
        bound.send(Abort("r"))  # before the event loop reads
        assert await received.get() == Release(1)
        bound.send(Abort("r"))
        bound.close()


async def test_a_message_that_cannot_be_handled_ends_the_connection() -> None:
    failed = asyncio.Event()

    def fail(message: object) -> None:
        raise ValueError

    with own_address() as address:
        bound, other = WorkerConnection(address), EngineConnection(address)
        bound.open(fail, failed.set)
        other.open(lambda message: None, lambda: None)
        other.send(Hello())
        await failed.wait()
        assert bound._socket is None
        other.close()
        bound.close()
