"""Tests of how tenants share the capacity: who makes room for whom, and a state machine of many tenants."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine_client.reservation import Reservation
from server.engine_client.shares import Shares
from server.http.errors import APIError, QueueFullError
from server.tenants import ANYBODY, Tenant

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
        for request in ended:
            request.fail(QueueFullError(1))
            self.requests.remove(request)
        request = Reservation(tenant, self.shares.update)
        request.add(count)
        self.requests.append(request)
        return list(ended)

    def held(self, tenant: Tenant) -> int:
        return sum(request.num_choices for request in self.requests if request.tenant == tenant)


@pytest.fixture
def holdings() -> Holdings:
    return Holdings()


def test_a_tenant_alone_may_hold_everything_and_no_more(holdings: Holdings) -> None:
    for _ in range(CAPACITY):
        assert holdings.admit(A) == []
    assert holdings.admit(A) is None


def test_the_newest_request_makes_room(holdings: Holdings) -> None:
    for _ in range(CAPACITY):
        holdings.admit(A)
    expected = list(reversed(holdings.requests))
    ended = [holdings.admit(B) for _ in range(CAPACITY // 2)]
    assert ended == [[request] for request in expected[: CAPACITY // 2]]
    assert holdings.admit(B) is None
    assert holdings.admit(A) is None
    assert (holdings.held(A), holdings.held(B)) == (CAPACITY // 2, CAPACITY // 2)


def test_a_request_whose_client_has_no_status_goes_first(holdings: Holdings) -> None:
    for _ in range(CAPACITY):
        holdings.admit(A)
    for request in holdings.requests[-3:]:
        request.is_answered = True
    expected = holdings.requests[-4]
    assert holdings.admit(B) == [expected]


def test_what_the_engine_has_begun_stays_and_others_get_half_as_much_in_addition(holdings: Holdings) -> None:
    holdings.admit(A, CAPACITY)
    holdings.requests[0].start()
    for _ in range(CAPACITY // 2):
        assert holdings.admit(B) == []
    assert holdings.admit(B) is None
    assert holdings.admit(A) is None
    newest = holdings.requests[-1]
    assert holdings.admit(C) == [newest]
    assert holdings.held(A) == CAPACITY


def test_one_request_of_many_choices_makes_room_as_a_whole(holdings: Holdings) -> None:
    holdings.admit(A, CAPACITY)
    (large,) = holdings.requests
    assert holdings.admit(B) == [large]
    assert large.num_choices == 0
    assert holdings.admit(A, CAPACITY) is None


def test_room_for_many_choices_or_none_at_all(holdings: Holdings) -> None:
    for _ in range(CAPACITY):
        holdings.admit(A)
    assert holdings.admit(B, CAPACITY // 2 + 1) is None
    assert holdings.held(A) == CAPACITY
    ended = holdings.admit(B, CAPACITY // 2)
    assert ended is not None
    assert len(ended) == CAPACITY // 2


def test_shares_follow_weights(holdings: Holdings) -> None:
    for _ in range(CAPACITY):
        holdings.admit(A)
    while holdings.admit(HEAVY) is not None:
        pass
    while holdings.admit(A) is not None:
        pass
    assert (holdings.held(HEAVY), holdings.held(A)) == (9, 3)


def test_three_tenants_end_with_a_third_each(holdings: Holdings) -> None:
    for tenant in (A, B, C) * 3:
        while holdings.admit(tenant) is not None:
            pass
    assert [holdings.held(tenant) for tenant in (A, B, C)] == [CAPACITY // 3] * 3


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


pytestmark = pytest.mark.anyio


class Stream:
    """Records the error that it fails with."""

    def __init__(self) -> None:
        self.error: APIError | None = None

    def fail(self, error: APIError) -> None:
        self.error = error


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
        reservation.hand_over(2, Stream())
        assert (reservation.count, reservation.num_choices) == (1, 3)
    assert (reservation.count, reservation.num_choices) == (0, 2)
    reservation.end_choice()
    reservation.end_choice()
    assert reservation.num_choices == 0
    assert changes == [3, -1, -1, -1]


async def test_failing_ends_all_streams_and_returns_what_none_uses(reservation: Reservation) -> None:
    streams = [Stream(), Stream()]
    for stream in streams:
        reservation.hand_over(1, stream)
    reservation.end_stream(streams[1])
    error = QueueFullError(1)
    reservation.fail(error)
    reservation.fail(QueueFullError(2))
    assert [stream.error for stream in streams] == [error, None]
    assert (reservation.count, reservation.num_choices) == (0, 2)
    for wait in (reservation.wait_for_start(5), reservation.wait_for_start(0)):
        with pytest.raises(QueueFullError) as caught:
            await wait
        assert caught.value is error


async def test_waiting_ends_with_the_start_or_the_time(reservation: Reservation) -> None:
    assert reservation.is_waiting
    await reservation.wait_for_start(0.01)
    assert reservation.is_waiting
    assert reservation.is_answered
    asyncio.get_running_loop().call_later(0.01, reservation.start)
    async with asyncio.timeout(50):
        await reservation.wait_for_start(60)
    assert not reservation.is_waiting


async def test_waiting_ends_when_all_choices_have_ended(reservation: Reservation) -> None:
    asyncio.get_running_loop().call_later(0.01, reservation.release)
    async with asyncio.timeout(50):
        await reservation.wait_for_start(60)
