"""Tests of admission control with a fake engine."""

import asyncio
import random
import secrets
from collections import Counter

import pytest

from engine.shared.messages import Abort, EngineInfo, FinishReason, TokenEvent
from server.engine_client.admission import Admission, AdmissionLimits
from server.engine_client.reservation import Reservation
from server.http.errors import (
    EngineUnavailableError,
    InvalidValueError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
    WaitTooLongError,
)
from server.metrics import Metrics
from server.statistics.choice_stats import ChoiceStats
from server.tenants import Tenant
from tests.support.engine_clients import PROMPT, connected, read, ready, request, tokens, until
from tests.support.engine_info import ENGINE_INFO
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.turned_loop import turn

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


@pytest.mark.parametrize("seed", [1, secrets.randbits(32)], ids=["1", "random"])
async def test_random_tenants_leave_nothing_behind(fake_engine: FakeEngine, seed: int) -> None:
    """Each request gets all of its tokens or one QueueFullError, and that only before its first token."""
    print("seed", seed)
    rng = random.Random(seed)
    fake_engine.config.step_seconds = 0.001
    fake_engine.pause()
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
                fake_engine.resume()
                return "rejected"
            assert sum(event.finish_reason is not None for event in events) == num_choices
            assert client.num_in_flight <= client.max_in_flight * 1.5
            return "answered"

        outcomes = Counter(await asyncio.gather(*(ask(number) for number in range(150))))
        assert set(outcomes) == {"answered", "rejected"}
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.num_choices == 0)


@pytest.mark.checklist("E11")
async def test_a_request_that_waits_for_too_long_ends(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    metrics = Metrics("lightwell_", "m")
    async with ready(fake_engine.config.address, metrics=metrics, queue_timeout=400.0, request_timeout=1e9) as client:
        tokenizing = client.reserve(1)
        patient = client.submit(request("patient", n=2), client.reserve(2, queue_timeout=600))
        hasty = client.submit(request("hasty"), client.reserve(1, queue_timeout=100))
        begun = client.submit(request("begun", max_tokens=4))
        begun.reservation.start()
        await turn(90.0)
        assert client.num_in_flight == 5
        for stream, timeout in ((hasty, 100), (patient, 400)):
            await turn(300.0 if stream is patient else 20.0)
            with pytest.raises(QueueTimeoutError, match=f"{timeout} seconds") as caught:
                await read(stream)
            assert (caught.value.status, caught.value.code) == (503, "request_timeout")
        with pytest.raises(QueueTimeoutError):
            client.submit(request("late"), tokenizing)
        expected = [Abort(name, reason=FinishReason.ERROR) for name in ("hasty", "patient")]
        await until(lambda: fake_engine.aborts == expected)
        labels = {"model_name": "m", "engine": "0", "reason": "queue_timeout"}
        assert metrics.registry.get_sample_value("lightwell_requests_rejected_total", labels) == 3
        fake_engine.resume()
        assert len(tokens(await read(begun))) == 4
        assert client.num_in_flight == 0


async def test_a_request_that_takes_too_long_ends(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    async with ready(fake_engine.config.address, request_timeout=300.0) as client:
        stream = client.submit(request(n=2, max_tokens=10_000))
        assert tokens(await anext(stream))
        await turn(200.0)
        assert tokens(await anext(stream))
        await turn(200.0)
        with pytest.raises(RequestTimeoutError) as caught:
            await read(stream)
        assert (caught.value.status, caught.value.code) == (503, "request_timeout")
        assert caught.value.headers == {"x-should-retry": "false"}
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.aborts == [Abort("r", reason=FinishReason.ERROR)])


class BusyEngines:
    """Engines that are ready, run one choice at a time, and have a long queue."""

    info, dead_reason, max_num_seqs, num_waiting = ENGINE_INFO, None, 1, 50

    def ready_info(self) -> EngineInfo:
        return self.info


@pytest.mark.checklist("E11")
async def test_a_request_that_would_wait_for_too_long_is_refused_at_once() -> None:
    """Each request is 102 tokens of work, of which the engines compute 200 in a second."""
    metrics = Metrics("lightwell_", "m")
    admission = Admission(BusyEngines(), metrics, AdmissionLimits(max_queued_requests=100))

    def reserve(tenant: Tenant, queue_timeout: float) -> Reservation:
        return admission.reserve(1, param="n", tenant=tenant, queue_timeout=queue_timeout)

    for _ in range(50):
        admission.expect(reserve(ALICE, 3), [ChoiceStats(0.0, 100, num_prompt_tokens=2)])
    for step in range(400):
        admission.count_step(2, 100.0 + step * 0.01)
    after = set()
    for _ in range(21):
        with pytest.raises(WaitTooLongError) as caught:
            reserve(ALICE, 3)
        after.add(int(caught.value.headers["retry-after"]))
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert 20 <= min(after) < max(after) <= 31  # 25.5 seconds, more or less
    reserve(ALICE, 30).release()
    reserve(BOB, 3).release()  # its turn is next
    labels = {"model_name": "m", "engine": "0", "reason": "predicted_wait"}
    assert metrics.registry.get_sample_value("lightwell_requests_rejected_total", labels) == 21


# Metrics.


async def test_metrics_follow_events(fake_engine: FakeEngine) -> None:
    metrics = Metrics("lightwell_", "m")
    labels = {"model_name": "m", "engine": "0"}

    def value(name: str, **more: str) -> float:
        return metrics.registry.get_sample_value(f"lightwell_{name}", labels | more) or 0.0

    fake_engine.config.num_cached_tokens = 1
    async with ready(fake_engine.config.address, metrics=metrics) as client:
        await read(client.submit(request("a", n=2)))
        num_tokens = len(fake_engine.config.reply) + 1
        assert value("request_success_total", finished_reason="stop") == 2
        assert value("time_to_first_token_seconds_count") == 2
        assert value("inter_token_latency_seconds_count") == 2 * (num_tokens - 1)
        assert value("request_generation_tokens_sum") == 2 * num_tokens
        assert value("request_prompt_tokens_sum") == 2 * len(PROMPT)
        assert value("request_prefill_kv_computed_tokens_sum") == 2 * (len(PROMPT) - 1)
        assert value("request_params_n_sum") == 2
        assert value("request_params_n_count") == 1
        assert value("request_params_max_tokens_sum") == 200
        assert value("request_max_num_generation_tokens_sum") == num_tokens
        assert value("request_queue_time_seconds_count") == 2
        assert value("request_decode_time_seconds_count") == 2
        assert value("iteration_tokens_total_sum") == 2 * num_tokens
        assert value("generation_tokens_total") == 2 * num_tokens
        fake_engine.pause()
        stream = client.submit(request("b"))
        await until(lambda: value("num_requests_waiting") == 1)
        await stream.aclose()
        await until(lambda: value("num_requests_waiting") == 0)
        assert value("request_success_total", finished_reason="abort") == 1
        with pytest.raises(InvalidValueError):
            client.reserve(1000)
        assert value("requests_rejected_total", reason="too_many_choices") == 1
