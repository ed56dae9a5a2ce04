"""Tests of the connection to the engine."""

import asyncio
from typing import Any

import pytest

from engine.shared.messages import LoadAdapter
from engine.shared.records import ReadQueue
from server.http.errors import AdaptersBusyError, EngineDeadError, ServerError
from tests.support.engine_clients import connected, read, ready, request, tokens, until
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine, FakeEngineConfig

pytestmark = pytest.mark.anyio


async def test_the_client_may_start_before_the_engine(address: str) -> None:
    async with connected(address) as client:
        await asyncio.sleep(0)
        with FakeEngine(FakeEngineConfig(address=address)):
            await until(lambda: client.is_ready)


async def test_an_error_of_the_receive_task_counts_as_death(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        fake_engine.pause()
        stream = client.submit(request())
        await until(lambda: fake_engine.num_choices)
        client.engines[0].streams.start = None  # type: ignore[method-assign,assignment]
        fake_engine.resume()
        with pytest.raises(EngineDeadError):
            await read(stream)
        assert client.died.is_set()


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("damage", [{"index": 7}, {"token_ids": "x"}, {"finish_reason": "x"}, {"index": -9}], ids=repr)
async def test_an_event_that_cannot_be_used_ends_its_request(fake_engine: FakeEngine, damage: dict[str, Any]) -> None:
    """The others go on."""
    async with ready(fake_engine.config.address) as client:
        fake_engine.pause()
        streams = [client.submit(request("bad", n=2)), client.submit(request("good"))]
        await until(lambda: fake_engine.num_choices == 3)
        event = {"request_id": "bad", "index": 1, "token_ids": [1]} | damage
        fake_engine.send_raw({"type": "Outputs", "stats": [], "events": [event]})
        with pytest.raises(ServerError):
            await read(streams[0])
        await until(lambda: fake_engine.num_choices == 1)
        fake_engine.resume()
        assert tokens(await read(streams[1])) == [*fake_engine.config.reply, EOS_TOKEN_ID]
        assert client.num_in_flight == 0
        assert client.is_healthy


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x81\xa6events", {"type": "Outputs", "events": [{}]}], ids=repr)
async def test_a_message_that_does_not_say_whose_events_are_lost(fake_engine: FakeEngine, message: object) -> None:
    """All requests end once, and the engine goes on."""
    async with ready(fake_engine.config.address) as client:
        fake_engine.pause()
        streams = [client.submit(request(f"{number}", n=2)) for number in range(3)]
        await until(lambda: fake_engine.num_choices == 6)
        fake_engine.send_raw(message)
        for stream in streams:
            with pytest.raises(ServerError):
                await read(stream)
            assert await read(stream) == []
        await until(lambda: not fake_engine.num_choices)
        fake_engine.resume()
        assert await read(client.submit(request("next")))
        assert client.num_in_flight == 0


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("name", ["Steps", "Requests", "Queue", "Blocks", "ReadFailed"])
async def test_an_answer_about_records_that_cannot_be_read(
    fake_engine: FakeEngine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions end, and the requests go on."""
    monkeypatch.setattr(fake_engine._loop, "_answer", lambda _: {"type": name, "read_id": "x"})
    async with ready(fake_engine.config.address) as client:
        fake_engine.pause()
        stream = client.submit(request())
        await until(lambda: fake_engine.num_choices)
        with pytest.raises(ServerError):
            await client.engines[0].records.ask(ReadQueue(limit=1))
        fake_engine.resume()
        assert tokens(await read(stream)) == [*fake_engine.config.reply, EOS_TOKEN_ID]


async def test_a_reply_about_an_adapter_that_cannot_be_read(fake_engine: FakeEngine) -> None:
    fake_engine.config.max_loras, fake_engine.config.ignores_adapters = 1, True
    async with ready(fake_engine.config.address) as client:
        change = asyncio.create_task(client.load_adapter("a", "p", replaces=False))
        await until(lambda: any(isinstance(message, LoadAdapter) for message in fake_engine.received))
        request_id = next(message.request_id for message in fake_engine.received if isinstance(message, LoadAdapter))
        fake_engine.send_raw({"type": "AdapterDone", "request_id": request_id, "error": 1})
        with pytest.raises(AdaptersBusyError):
            await change


async def test_an_engine_whose_first_message_cannot_be_read_is_dead(address: str) -> None:
    config = FakeEngineConfig(address=address, never_ready=True)
    with FakeEngine(config) as engine:
        async with connected(address) as client:
            await until(lambda: engine.received)
            config.never_ready = False
            await until(lambda: client.is_ready)
            engine.send_raw({"type": "Ready", "info": 1})
            await until(client.died.is_set)
