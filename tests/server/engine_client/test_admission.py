"""Admission control with a fake engine, how tenants share the capacity, and how long a request would wait."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock, call, patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.shared.messages import Abort, FinishReason
from server.engine_client.admission import FIRST_OUTPUT, Admission, AdmissionLimits, WaitEstimate
from server.engine_client.client import EngineClient
from server.engine_client.reservation import Backlog, Reservation, Shares
from server.http import errors
from server.metrics import ChoiceStats, Metrics
from server.tenants import ANYBODY, Tenant
from tests.support.engine_clients import PROMPT, read, read_error, ready, request, sample, tokens, until
from tests.support.engine_info import ENGINE_INFO
from tests.support.fake_engine import FakeEngine
from tests.support.turned_loop import turn

pytestmark = pytest.mark.anyio


@pytest.mark.checklist("E03", "E05")
async def test_reservation_is_all_or_nothing(client: EngineClient, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    limit = fake_engine.config.max_num_seqs + 4
    assert client.max_in_flight == limit
    with client.reserve(limit - 1):
        with pytest.raises(errors.QueueFullError) as caught:
            client.reserve(2)
        assert 1 <= int(caught.value.headers["retry-after"]) <= 60
        assert client.num_in_flight == limit - 1
        client.reserve(1).release()
    assert client.num_in_flight == 0
    with pytest.raises(errors.InvalidValueError) as refused:  # which cannot be retried
        client.reserve(limit + 1)
    assert (refused.value.status, refused.value.param) == (400, "n")


ALICE, BOB = Tenant(name="alice"), Tenant(name="bob")


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
            error = await read_error(stream, errors.QueueTimeoutError, match=f"{timeout} seconds")
            assert (error.status, error.code) == (503, "request_timeout")
        with pytest.raises(errors.QueueTimeoutError):
            client.submit(request("late"), tokenizing)
        expected = [Abort(name, reason=FinishReason.ERROR) for name in ("hasty", "patient")]
        await until(lambda: fake_engine.aborts == expected)
        assert sample(metrics, "requests_rejected_total", reason="queue_timeout") == 3
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
        error = await read_error(stream, errors.RequestTimeoutError)
        assert (error.status, error.code) == (503, "request_timeout")
        assert error.headers == {"x-should-retry": "false"}
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.aborts == [Abort("r", reason=FinishReason.ERROR)])


@pytest.mark.checklist("E11")
async def test_a_request_that_would_wait_for_too_long_is_refused_at_once() -> None:
    """Each request is 102 tokens of work, of which the engine, which runs one at a time, computes 200 in a second."""
    metrics = Metrics("lightwell_", "m")
    admission = Admission(metrics, AdmissionLimits(max_queued_requests=100))
    admission.info, admission.max_num_seqs = ENGINE_INFO, 1

    def reserve(tenant: Tenant, queue_timeout: float) -> Reservation:
        return admission.reserve(1, param="n", tenant=tenant, queue_timeout=queue_timeout)

    for _ in range(50):
        admission.expect(reserve(ALICE, 3), [ChoiceStats(0.0, 100, num_prompt_tokens=2)])
    for step in range(400):
        admission.count_step(2, 100.0 + step * 0.01, engine=0, num_waiting=50)
    after = set()
    for _ in range(21):
        with pytest.raises(errors.WaitTooLongError) as caught:
            reserve(ALICE, 3)
        after.add(int(caught.value.headers["retry-after"]))
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert 20 <= min(after) < max(after) <= 31  # 25.5 seconds, more or less
    reserve(ALICE, 30).release()
    reserve(BOB, 3).release()  # its turn is next
    assert sample(metrics, "requests_rejected_total", reason="predicted_wait") == 21


# Metrics.


async def test_metrics_follow_events(fake_engine: FakeEngine) -> None:
    metrics = Metrics("lightwell_", "m")
    fake_engine.config.num_cached_tokens = 1
    async with ready(fake_engine.config.address, metrics=metrics) as client:
        await read(client.submit(request("a", n=2)))
        num_tokens = len(fake_engine.config.reply) + 1
        expected = {
            "time_to_first_token_seconds_count": 2,
            "inter_token_latency_seconds_count": 2 * (num_tokens - 1),
            "request_generation_tokens_sum": 2 * num_tokens,
            "request_prompt_tokens_sum": 2 * len(PROMPT),
            "request_prefill_kv_computed_tokens_sum": 2 * (len(PROMPT) - 1),
            "request_params_n_sum": 2,
            "request_params_n_count": 1,
            "request_params_max_tokens_sum": 200,
            "request_max_num_generation_tokens_sum": num_tokens,
            "request_queue_time_seconds_count": 2,
            "request_decode_time_seconds_count": 2,
            "iteration_tokens_total_sum": 2 * num_tokens,
            "generation_tokens_total": 2 * num_tokens,
        }
        assert {name: sample(metrics, name) for name in expected} == expected
        assert sample(metrics, "request_success_total", finished_reason="stop") == 2
        fake_engine.pause()
        stream = client.submit(request("b"))
        await until(lambda: sample(metrics, "num_requests_waiting") == 1)
        stream.close()
        await until(lambda: sample(metrics, "num_requests_waiting") == 0)
        assert sample(metrics, "request_success_total", finished_reason="abort") == 1
        with pytest.raises(errors.InvalidValueError):
            client.reserve(1000)
        assert sample(metrics, "requests_rejected_total", reason="too_many_choices") == 1


# How tenants share the capacity: who makes room for whom, and a state machine of many tenants.


A, B, C, HEAVY = Tenant(name="a"), Tenant(name="b"), Tenant(name="c"), Tenant(name="heavy", weight=3.0)
CAPACITY = 12


class Holdings:
    """Shares, and the requests that are admitted to them."""

    def __init__(self) -> None:
        self.shares = Shares()
        self.requests: list[Reservation] = []

    def admit(self, tenant: Tenant, count: int = 1) -> list[Reservation] | None:
        """Admit a request. Return the requests that made room, or None if it is refused."""
        ended = self.shares.make_room(tenant, count, CAPACITY)
        if ended is None:
            return None
        for each in ended:
            each.fail(errors.QueueFullError(1))
            self.requests.remove(each)
        request = Reservation(tenant, self.shares.update)
        request.add(count)
        self.requests.append(request)
        return list(ended)

    def held(self, tenant: Tenant) -> int:
        return sum(request.num_choices for request in self.requests if request.tenant == tenant)


@pytest.mark.parametrize(
    "steps",
    [
        [*[(A, 1, [])] * 12, (A, 1, None)],  # a tenant alone may hold everything and no more
        [*[(A, 1, [])] * 12, *((B, 1, [11 - n]) for n in range(6)), (B, 1, None), (A, 1, None)],  # the newest go
        [(A, 12, []), (B, 1, [0]), (A, 12, None)],  # a request of many choices makes room as a whole
        [*[(A, 1, [])] * 12, (B, 7, None), (B, 6, [11, 10, 9, 8, 7, 6])],  # room for many choices or none at all
    ],
)
def test_who_makes_room(steps: list[tuple[Tenant, int, list[int] | None]]) -> None:
    """Each step: a tenant, the choices that it asks for, and the numbers of the requests that end; None: refused."""
    holdings, admitted = Holdings(), list[Any]()
    for tenant, count, expected in steps:
        ended = holdings.admit(tenant, count)
        assert expected == (None if ended is None else [admitted.index(request) for request in ended])
        if ended is not None:
            admitted.append(holdings.requests[-1])
    assert all(request in holdings.requests or not request.num_choices for request in admitted)


def test_a_request_whose_client_has_no_status_goes_first() -> None:
    holdings = Holdings()
    for _ in range(CAPACITY):
        holdings.admit(A)
    for each in holdings.requests[-3:]:
        each.is_answered = True
    expected = holdings.requests[-4]
    assert holdings.admit(B) == [expected]


def test_what_the_engine_has_begun_stays_and_others_get_half_as_much_in_addition() -> None:
    holdings = Holdings()
    holdings.admit(A, CAPACITY)
    holdings.requests[0].start()
    for _ in range(CAPACITY // 2):
        assert holdings.admit(B) == []
    assert holdings.admit(B) is None
    assert holdings.admit(A) is None
    newest = holdings.requests[-1]
    assert holdings.admit(C) == [newest]
    assert holdings.held(A) == CAPACITY


@pytest.mark.parametrize(("order", "parts"), [((A, HEAVY, A), {A: 3, HEAVY: 9}), ((A, B, C) * 3, {A: 4, B: 4, C: 4})])
def test_parts_follow_weights(order: tuple[Tenant, ...], parts: dict[Tenant, int]) -> None:
    """Each asks as long as it gets something."""
    holdings = Holdings()
    for tenant in order:
        while holdings.admit(tenant) is not None:
            pass
    assert {tenant: holdings.held(tenant) for tenant in parts} == parts


class ManyTenants(RuleBasedStateMachine):
    """Tenants ask for capacity, the engine begins with requests and ends choices, clients leave."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.holdings = Holdings()

    @rule(target=requests, tenant=st.sampled_from((A, B, C, HEAVY)), count=st.integers(1, CAPACITY))
    def ask(self, tenant: Tenant, count: int) -> Reservation | None:
        before = list(self.holdings.requests)
        total, after = self.holdings.shares.num_choices + count, self.holdings.held(tenant) + count
        rivals = {request.tenant for request in before} - {tenant}
        part = CAPACITY * tenant.weight / (tenant.weight + sum(rival.weight for rival in rivals))
        ended = self.holdings.admit(tenant, count)
        if ended is None:
            assert self.holdings.requests == before, "a refused request has ended another"
            assert total > CAPACITY, "there was room"
            assert after > part or total > CAPACITY * 1.5, "the tenant is within its part"
            return None
        assert (total <= CAPACITY) <= (not ended), "a request was ended although there was room"
        assert all(request.started is None and request.tenant != tenant for request in ended)
        return self.holdings.requests[-1]

    @rule(request=requests)
    def begin(self, request: Reservation | None) -> None:
        if request in self.holdings.requests:
            request.start()

    @rule(request=requests)
    def status_is_sent(self, request: Reservation | None) -> None:
        if request in self.holdings.requests:
            request.is_answered = True

    @rule(request=consumes(requests))
    def leave(self, request: Reservation | None) -> None:
        if request in self.holdings.requests:
            self.holdings.requests.remove(request)
            request.release()

    @invariant()
    def the_books_are_right(self) -> None:
        shares = self.holdings.shares
        assert shares.num_choices == sum(request.num_choices for request in self.holdings.requests)
        assert shares.num_choices <= CAPACITY * 1.5
        assert set(shares._by_tenant) == {request.tenant.name for request in self.holdings.requests}


TestManyTenants = ManyTenants.TestCase


# The life of an admitted request: capacity, start, failure, and the wait for them.


@pytest.fixture
def changes() -> list[int]:
    return []


@pytest.fixture
def reservation(changes: list[int]) -> Reservation:
    reservation = Reservation(ANYBODY, lambda _, change: changes.append(change))
    reservation.add(3)
    return reservation


def test_capacity_is_counted_until_the_last_choice_ends(reservation: Reservation, changes: list[int]) -> None:
    with reservation:
        reservation.hand_over(2, Mock())
        assert (reservation.count, reservation.num_choices) == (1, 3)
    assert (reservation.count, reservation.num_choices) == (0, 2)
    reservation.end_choice()
    reservation.end_choice()
    assert reservation.num_choices == 0
    assert changes == [3, -1, -1, -1]


async def test_failing_ends_all_streams_and_returns_what_none_uses(reservation: Reservation) -> None:
    streams = [Mock(), Mock()]
    for stream in streams:
        reservation.hand_over(1, stream)
    reservation.end_stream(streams[1])
    error = errors.QueueFullError(1)
    reservation.fail(error)
    reservation.fail(errors.QueueFullError(2))
    assert [stream.fail.mock_calls for stream in streams] == [[call(error)], []]
    assert (reservation.count, reservation.num_choices) == (0, 2)
    for wait in (reservation.wait_for_start(5), reservation.wait_for_start(0)):
        with pytest.raises(errors.QueueFullError) as caught:
            await wait
        assert caught.value is error


async def test_waiting_ends_with_the_time_the_start_or_the_last_choice(reservation: Reservation) -> None:
    waiting = asyncio.create_task(reservation.wait_for_start(60))
    await turn(0)
    await turn(59)
    assert (waiting.done(), reservation.is_answered) == (False, False)
    await turn(2)
    assert (waiting.done(), reservation.is_answered, reservation.is_waiting) == (True, True, True)
    for end in (reservation.release, reservation.start):
        reservation._is_settled.clear()
        waiting = asyncio.create_task(reservation.wait_for_start(60))
        await turn(0)
        assert not waiting.done()
        end()
        await waiting
    assert not reservation.is_waiting


# The estimate of how long a request would wait.


def measured(tokens_per_second: int, seconds: int = 10) -> WaitEstimate:
    """Return an estimate after `seconds` of steps while requests waited."""
    estimate = WaitEstimate()
    for step in range(seconds + 1):
        estimate.add_step(tokens_per_second, 100.0 + step, is_saturated=True)
    return estimate


def test_there_is_no_estimate_before_anything_is_measured() -> None:
    estimate = WaitEstimate()
    estimate.add_step(500, 100.0, is_saturated=True)
    estimate.add_step(500, 100.5, is_saturated=True)
    assert estimate.seconds(Backlog(1e6, 1.0), []) == 0


@pytest.mark.parametrize(
    ("own", "others", "tokens"),
    [
        *((Backlog(2000, 1.0), [], 2000), (Backlog(0, 1.0), [], 0)),
        (Backlog(0, 1.0), [Backlog(1e9, 1.0)], 0),  # its turn is next
        (Backlog(1000, 1.0), [Backlog(1e9, 1.0)], 2000),
        (Backlog(1000, 1.0), [Backlog(100, 1.0), Backlog(1e9, 1.0)], 2100),
        (Backlog(1000, 4.0), [Backlog(1e9, 1.0)], 1250),
        (Backlog(1000, 1.0), [Backlog(1e9, 3.0)], 4000),
    ],
)
def test_others_delay_a_tenant_by_their_turns_and_no_more_than_their_backlog(
    own: Backlog, others: list[Backlog], tokens: float
) -> None:
    assert measured(500).seconds(own, others) == pytest.approx(tokens / 500, rel=0.1)


def test_time_in_which_nothing_waits_does_not_count() -> None:
    estimate = measured(500)
    estimate.add_step(1, 111.0, is_saturated=False)
    for second in range(1000):
        estimate.add_step(1, 112.0 + second, is_saturated=False)
    assert estimate.seconds(Backlog(2000, 1.0), []) == pytest.approx(4, rel=0.2)


def test_recent_throughput_counts_more() -> None:
    estimate = measured(500, seconds=60)
    for second in range(120):
        estimate.add_step(100, 161.0 + second, is_saturated=True)
    assert estimate.seconds(Backlog(2000, 1.0), []) == pytest.approx(20, rel=0.1)


def test_cached_prompt_tokens_are_work_done() -> None:
    estimate = measured(500)
    estimate.add_cached(5000)
    assert estimate.seconds(Backlog(2000, 1.0), []) == pytest.approx(2, rel=0.1)


def test_the_expected_output_follows_recent_ones() -> None:
    estimate = WaitEstimate()
    assert estimate.mean_output == FIRST_OUTPUT
    for _ in range(200):
        estimate.add_output(40)
    assert estimate.mean_output == pytest.approx(40, rel=0.01)


def test_the_time_in_which_a_lost_engine_computed_is_no_waiting() -> None:
    reservation = Reservation(ANYBODY, Mock())
    reservation.start_by = 60.0
    with patch("server.engine_client.reservation.time.monotonic", side_effect=[50.0, 80.0]):
        reservation.start()
        reservation.lose_start()
    assert (reservation.start_by, reservation.is_waiting) == (90.0, True)
