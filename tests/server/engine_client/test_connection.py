"""Tests of the connection to the engine."""

import asyncio

import pytest

from server.http.errors import EngineDeadError
from tests.support.engine_clients import connected, read, ready, request, until
from tests.support.fake_engine import FakeEngine, FakeEngineConfig

pytestmark = pytest.mark.anyio


async def test_the_client_may_start_before_the_engine(address: str) -> None:
    async with connected(address) as client:
        await asyncio.sleep(0.05)
        with FakeEngine(FakeEngineConfig(address=address)):
            await until(lambda: client.is_ready)


async def test_an_error_of_the_receive_task_counts_as_death(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        fake_engine.pause()
        stream = client.submit(request())
        await until(lambda: fake_engine.num_choices)
        stream.push = None  # type: ignore[method-assign,assignment]
        fake_engine.resume()
        with pytest.raises(EngineDeadError):
            await read(stream)
        assert client.died.is_set()
