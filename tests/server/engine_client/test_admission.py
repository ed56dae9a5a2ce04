"""Tests of admission control with a fake engine."""

import pytest

from server.http.errors import EngineUnavailableError, InvalidValueError, QueueFullError
from tests.support.engine_clients import connected, read, ready, request, tokens, until
from tests.support.fake_engine import FakeEngine, FakeEngineConfig

pytestmark = pytest.mark.anyio


@pytest.mark.checklist("E03")
async def test_reservation_is_all_or_nothing(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    limit = fake_engine.config.max_num_seqs + 4
    async with ready(fake_engine.config.address) as client:
        assert client.max_in_flight == limit
        with client.reserve(limit - 1):
            with pytest.raises(QueueFullError) as caught:
                client.reserve(2)
            assert 1 <= int(caught.value.headers["retry-after"]) <= 60
            assert client.num_in_flight == limit - 1
            client.reserve(1).release()
        assert client.num_in_flight == 0


@pytest.mark.checklist("E05")
async def test_more_choices_than_the_capacity_cannot_be_retried(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        with pytest.raises(InvalidValueError) as caught:
            client.reserve(client.max_in_flight + 1)
        assert (caught.value.status, caught.value.param) == (400, "n")


@pytest.mark.checklist("E03")
async def test_capacity_is_returned_whatever_fails(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        with pytest.raises(ZeroDivisionError), client.reserve(3):
            raise ZeroDivisionError
        assert client.num_in_flight == 0
        with client.reserve(3) as reservation:
            stream = client.submit(request(n=2), reservation)
        assert client.num_in_flight == 2
        await stream.aclose()
        assert client.num_in_flight == 0


async def test_each_choice_returns_its_capacity_when_it_ends(fake_engine: FakeEngine) -> None:
    fake_engine.config.max_num_seqs = 1
    fake_engine.config.step_seconds = 0.005
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request(n=2))
        await until(lambda: client.num_in_flight == 1)
        assert stream.num_open == 1
        await read(stream)


async def test_nothing_is_admitted_before_the_engine_is_ready(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, never_ready=True)):
        async with connected(address) as client:
            with pytest.raises(EngineUnavailableError):
                client.reserve(1)


async def test_nothing_is_admitted_while_draining(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request())
        client.drain()
        with pytest.raises(EngineUnavailableError) as caught:
            client.reserve(1)
        assert caught.value.headers["connection"] == "close"
        assert tokens(await read(stream))[:-1] == fake_engine.config.reply
