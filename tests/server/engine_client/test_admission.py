"""Tests of admission control with a fake engine."""

import asyncio
import random
import secrets
from collections import Counter

import pytest

from engine.shared.messages import Abort, FinishReason, TokenEvent
from server.http.errors import (
    EngineUnavailableError,
    InvalidValueError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    WaitTooLongError,
)
from server.metrics import Metrics
from server.tenants import Tenant
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


ALICE, BOB = Tenant(name="alice"), Tenant(name="bob")


async def test_the_newest_waiting_request_makes_room_for_another_tenant(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    metrics = Metrics("lightwell_", "m")
    async with ready(fake_engine.config.address, metrics=metrics) as client:
        streams = [
            client.submit(request(f"{i}"), client.reserve(1, tenant=ALICE)) for i in range(client.max_in_flight - 1)
        ]
        unsent = client.reserve(1, tenant=ALICE)
        others = [client.submit(request(f"b{i}"), client.reserve(1, tenant=BOB)) for i in range(2)]
        assert client.num_in_flight == client.max_in_flight
        with pytest.raises(QueueFullError) as caught:
            client.submit(request("late"), unsent)
        assert 1 <= int(caught.value.headers["retry-after"]) <= 60
        with pytest.raises(QueueFullError):
            await read(streams[-1])
        await until(lambda: fake_engine.aborts == [Abort(streams[-1].request_id, reason=FinishReason.ERROR)])
        fake_engine.resume()
        for stream in [*streams[:-1], *others]:
            assert tokens(await read(stream))[:-1] == fake_engine.config.reply
        assert client.num_in_flight == 0
        labels = {"model_name": "m", "engine": "0", "reason": "evicted"}
        assert metrics.registry.get_sample_value("lightwell_requests_rejected_total", labels) == 2


async def test_a_request_with_tokens_is_never_ended_for_another(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.002
    async with ready(fake_engine.config.address) as client:
        count = client.max_in_flight
        large = client.submit(request("large", n=count, max_tokens=40), client.reserve(count, tenant=ALICE))
        await anext(large)
        small = client.submit(request("small", max_tokens=5), client.reserve(1, tenant=BOB))
        assert client.num_in_flight > count
        with pytest.raises(QueueFullError):
            client.reserve(1, tenant=ALICE)
        assert len(tokens(await read(small))) == 5
        await read(large)
        assert [stats.num_output_tokens for stats in large.choices] == [40] * count
        assert client.num_in_flight == 0


@pytest.mark.parametrize("seed", [1, 2, secrets.randbits(32)], ids=["1", "2", "random"])
async def test_random_tenants_leave_nothing_behind(fake_engine: FakeEngine, seed: int) -> None:
    """Each request gets all of its tokens or one QueueFullError, and that only before its first token."""
    print("seed", seed)
    rng = random.Random(seed)
    fake_engine.config.step_seconds = 0.001
    async with ready(fake_engine.config.address, max_queued_requests=12) as client:

        async def ask(number: int) -> str:
            tenant = rng.choice((ALICE, BOB, Tenant(name="carol", weight=2.0)))
            await asyncio.sleep(rng.random() * 0.3)
            events: list[TokenEvent] = []
            num_choices, pause = rng.randint(1, 4), rng.random() * 0.01
            try:
                with client.reserve(num_choices, tenant=tenant) as reservation:
                    await asyncio.sleep(pause)
                    stream = client.submit(request(f"{number}", n=num_choices), reservation)
                async with stream:
                    async for batch in stream:
                        events += batch
            except QueueFullError:
                assert not events
                return "rejected"
            assert sum(event.finish_reason is not None for event in events) == num_choices
            assert client.num_in_flight <= client.max_in_flight * 1.5
            return "answered"

        outcomes = Counter(await asyncio.gather(*(ask(number) for number in range(300))))
        assert set(outcomes) == {"answered", "rejected"}
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.num_choices == 0)


@pytest.mark.checklist("E11")
async def test_a_request_that_waits_for_too_long_ends(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    metrics = Metrics("lightwell_", "m")
    async with ready(fake_engine.config.address, metrics=metrics, queue_timeout=0.4) as client:
        tokenizing = client.reserve(1)
        patient = client.submit(request("patient", n=2), client.reserve(2, queue_timeout=60))
        hasty = client.submit(request("hasty"), client.reserve(1, queue_timeout=0.1))
        for stream, timeout in ((hasty, 0.1), (patient, 0.4)):
            with pytest.raises(QueueTimeoutError, match=f"{timeout} seconds") as caught:
                await read(stream)
            assert (caught.value.status, caught.value.code) == (503, "request_timeout")
        with pytest.raises(QueueTimeoutError):
            client.submit(request("late"), tokenizing)
        assert client.num_in_flight == 0
        expected = [Abort(name, reason=FinishReason.ERROR) for name in ("hasty", "patient")]
        await until(lambda: fake_engine.aborts == expected)
        labels = {"model_name": "m", "engine": "0", "reason": "queue_timeout"}
        assert metrics.registry.get_sample_value("lightwell_requests_rejected_total", labels) == 3


async def test_a_request_that_has_begun_has_no_queue_timeout(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.02
    async with ready(fake_engine.config.address, queue_timeout=0.2) as client:
        assert len(tokens(await read(client.submit(request(max_tokens=40))))) == 40


async def test_a_request_that_takes_too_long_ends(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    async with ready(fake_engine.config.address, request_timeout=0.3) as client:
        stream = client.submit(request(n=2, max_tokens=10_000))
        assert tokens(await anext(stream))
        with pytest.raises(RequestTimeoutError) as caught:
            await read(stream)
        assert (caught.value.status, caught.value.code) == (503, "request_timeout")
        assert caught.value.headers == {"x-should-retry": "false"}
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.aborts == [Abort("r", reason=FinishReason.ERROR)])


@pytest.mark.checklist("E11")
async def test_a_request_that_would_wait_for_too_long_is_refused_at_once(fake_engine: FakeEngine) -> None:
    """Each request is 102 tokens of work, of which the engine computes about 200 in a second."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.02
    fake_engine.config.max_num_seqs = 4
    metrics = Metrics("lightwell_", "m")
    async with ready(fake_engine.config.address, metrics=metrics, max_queued_requests=100) as client:
        streams = [client.submit(request(f"{i}"), client.reserve(1, tenant=ALICE)) for i in range(54)]
        await until(lambda: sum(stats.num_output_tokens for stream in streams for stats in stream.choices) > 300)
        with pytest.raises(WaitTooLongError) as caught:
            client.reserve(1, tenant=ALICE, queue_timeout=3)
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        after = {int(caught.value.headers["retry-after"])}
        for _ in range(20):
            with pytest.raises(WaitTooLongError) as caught:
                client.reserve(1, tenant=ALICE, queue_timeout=3)
            after.add(int(caught.value.headers["retry-after"]))
        assert 10 < min(after) < max(after) <= 60
        client.reserve(1, tenant=ALICE, queue_timeout=600).release()
        client.reserve(1, tenant=BOB, queue_timeout=3).release()  # its turn is next
        labels = {"model_name": "m", "engine": "0", "reason": "predicted_wait"}
        assert metrics.registry.get_sample_value("lightwell_requests_rejected_total", labels) == 21
        for stream in streams:
            stream.close()
