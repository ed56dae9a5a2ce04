"""Tests of the streams of events, with a fake engine over a real ZeroMQ socket."""

import asyncio

import pytest

from engine.shared.messages import Abort, FinishReason, SamplingParams, Submit
from server.engine_client.streams import MAX_BATCH_EVENTS
from server.http.errors import APIError, EngineUnavailableError
from tests.support.engine_clients import read, ready, request, tokens, until
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine

pytestmark = pytest.mark.anyio


async def test_stream_ends_with_its_finish_reason(fake_engine: FakeEngine) -> None:
    fake_engine.config.num_cached_tokens = 1
    async with ready(fake_engine.config.address) as client:
        events = await read(client.submit(request()))
        assert tokens(events) == [*fake_engine.config.reply, EOS_TOKEN_ID]
        assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.STOP]
        assert events[0].num_cached_tokens == 1
        assert events[-1].stop_token_id == EOS_TOKEN_ID
        assert client.num_in_flight == 0
        assert fake_engine.aborts == []


async def test_events_reach_the_choices_of_their_requests(fake_engine: FakeEngine) -> None:
    fake_engine.config.replies = [(list(b"one"), list(b"first")), (list(b"two"), list(b"second"))]
    async with ready(fake_engine.config.address, max_queued_requests=100) as client:
        submits = [
            Submit(request_id=f"{i}", prompt_token_ids=list(p), params=SamplingParams(max_tokens=50), arrival=0.0, n=3)
            for i, p in enumerate([b"one", b"two"] * 5)
        ]
        answers = await asyncio.gather(*(read(client.submit(submit)) for submit in submits))
        for submit, events in zip(submits, answers, strict=True):
            reply = b"first" if bytes(submit.prompt_token_ids) == b"one" else b"second"
            for index in range(3):
                assert bytes(tokens(events, index)[:-1]) == reply
            assert {event.request_id for event in events} == {submit.request_id}
        assert client.num_in_flight == 0


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


async def test_closing_a_stream_aborts_its_request(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01
    async with ready(fake_engine.config.address) as client:
        async with client.submit(request(n=2, max_tokens=10_000)) as stream:
            await anext(stream)
            assert client.num_in_flight == 2
        assert client.num_in_flight == 0
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await until(lambda: fake_engine.aborts and not fake_engine.num_choices)
        assert fake_engine.aborts == [Abort("r")]


async def test_cancelling_the_reader_returns_its_capacity(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:

        async def consume() -> None:
            async with client.submit(request()) as stream:
                await read(stream)

        task = asyncio.create_task(consume())
        await until(lambda: fake_engine.num_choices)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert client.num_in_flight == 0
        await until(lambda: not fake_engine.num_choices)


async def test_abort_choice_ends_only_that_choice(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.002
    async with ready(fake_engine.config.address) as client:
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


async def test_fail_streams_reaches_readers_and_engine(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request(n=2))
        client.fail_streams(EngineUnavailableError("over"))
        with pytest.raises(EngineUnavailableError, match="over"):
            await read(stream)
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.aborts == [Abort("r", reason=FinishReason.ERROR)])


async def test_close_ends_streams(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request())
    with pytest.raises(APIError):
        await read(stream)
