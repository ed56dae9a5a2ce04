"""The streams of events over a real ZeroMQ socket, with a fake engine, and messages that cannot be read."""

import asyncio
from typing import Any

import msgspec
import pytest

from engine.shared.messages import Abort, FinishReason
from server.engine_client.client import EngineClient
from server.engine_client.streams import MAX_BATCH_EVENTS
from server.http.errors import APIError, EngineDeadError, EngineUnavailableError, ServerError
from tests.support.engine_clients import connected, read, read_error, ready, request, tokens, until
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine, FakeEngineConfig

pytestmark = pytest.mark.anyio


async def test_events_reach_the_choices_of_their_requests(fake_engine: FakeEngine) -> None:
    replies = {b"one": b"first", b"two": b"second"}
    fake_engine.config.replies = [(list(prompt), list(reply)) for prompt, reply in replies.items()]
    async with ready(fake_engine.config.address, max_queued_requests=100) as client:
        prompts = [b"one", b"two"] * 5
        streams = [
            client.submit(msgspec.structs.replace(request(f"{number}", n=3), prompt_token_ids=list(prompt)))
            for number, prompt in enumerate(prompts)
        ]
        for prompt, stream, events in zip(prompts, streams, await asyncio.gather(*map(read, streams)), strict=True):
            assert [bytes(tokens(events, index)[:-1]) for index in range(3)] == [replies[prompt]] * 3
            assert {event.request_id for event in events} == {stream.request_id}
        assert client.num_in_flight == 0
        assert fake_engine.aborts == []


async def test_a_reader_that_is_behind_lets_others_run(fake_engine: FakeEngine) -> None:
    """It gets no more than a bounded number of events at a time, and between them the event loop goes on."""
    fake_engine.config.endless = True
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request(max_tokens=4 * MAX_BATCH_EVENTS))
        await until(lambda: stream.num_open == 0)
        other = asyncio.create_task(count_turns())
        batches = [batch async for batch in stream]
        other.cancel()
    assert [len(batch) for batch in batches] == [MAX_BATCH_EVENTS] * 4
    assert turns >= 3


async def test_closing_a_stream_aborts_its_request(client: EngineClient, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01
    async with client.submit(request(n=2, max_tokens=10_000)) as stream:
        await anext(stream)
        assert client.num_in_flight == 2
    assert client.num_in_flight == 0
    stream.close()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await until(lambda: fake_engine.aborts and not fake_engine.num_choices)
    assert fake_engine.aborts == [Abort("r")]


async def test_abort_choice_ends_only_that_choice(client: EngineClient, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.002
    stream = client.submit(request(n=2, max_tokens=50))
    first = await anext(stream)
    stream.abort_choice(1)
    assert client.num_in_flight == 1
    stream.abort_choice(1)
    rest = await read(stream)
    assert {event.index for event in rest} == {0}
    assert len(tokens(first + rest, 0)) == 50
    assert client.num_in_flight == 0
    assert fake_engine.aborts == [Abort("r", 1, FinishReason.STOP)]


async def test_fail_streams_reaches_readers_and_engine(client: EngineClient, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    stream = client.submit(request(n=2))
    client.fail_streams(EngineUnavailableError("over"))
    await read_error(stream, EngineUnavailableError, match="over")
    assert client.num_in_flight == 0
    await until(lambda: fake_engine.aborts == [Abort("r", reason=FinishReason.ERROR)])


async def test_close_ends_streams(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request())
    await read_error(stream, APIError)


# Messages that cannot be read.


async def test_an_error_of_the_receive_task_counts_as_death(client: EngineClient, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    stream = client.submit(request())
    await until(lambda: fake_engine.num_choices)
    client.engines[0].streams.start = None  # type: ignore[method-assign,assignment]
    fake_engine.resume()
    await read_error(stream, EngineDeadError)
    assert client.died.is_set()


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("damage", [{"index": 7}, {"token_ids": "x"}, {"finish_reason": "x"}, {"index": -9}], ids=repr)
async def test_an_event_that_cannot_be_used_ends_its_request(
    client: EngineClient, fake_engine: FakeEngine, damage: dict[str, Any]
) -> None:
    """The others go on."""
    fake_engine.pause()
    streams = [client.submit(request("bad", n=2)), client.submit(request("good"))]
    await until(lambda: fake_engine.num_choices == 3)
    event = {"request_id": "bad", "index": 1, "token_ids": [1]} | damage
    fake_engine.send_raw({"type": "Outputs", "stats": [], "events": [event]})
    await read_error(streams[0], ServerError)
    await until(lambda: fake_engine.num_choices == 1)
    fake_engine.resume()
    assert tokens(await read(streams[1])) == [*fake_engine.config.reply, EOS_TOKEN_ID]
    assert client.num_in_flight == 0
    assert client.is_healthy


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x81\xa6events", {"type": "Outputs", "events": [{}]}], ids=repr)
async def test_a_message_that_does_not_say_whose_events_are_lost(
    client: EngineClient, fake_engine: FakeEngine, message: object
) -> None:
    """All requests end once, and the engine goes on."""
    fake_engine.pause()
    streams = [client.submit(request(f"{number}", n=2)) for number in range(3)]
    await until(lambda: fake_engine.num_choices == 6)
    fake_engine.send_raw(message)
    for stream in streams:
        await read_error(stream, ServerError)
        assert await read(stream) == []
    await until(lambda: not fake_engine.num_choices)
    fake_engine.resume()
    assert await read(client.submit(request("next")))
    assert client.num_in_flight == 0


async def test_an_engine_whose_first_message_cannot_be_read_is_dead(address: str) -> None:
    config = FakeEngineConfig(address=address, never_ready=True)
    with FakeEngine(config) as engine:
        async with connected(address) as client:
            await until(lambda: engine.received)
            config.never_ready = False
            await until(lambda: client.is_ready)
            engine.send_raw({"type": "Ready", "info": 1})
            await until(client.died.is_set)
