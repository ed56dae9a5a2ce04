"""Tests of the life of an admitted request: capacity, start, failure, and the wait for them."""

import asyncio

import pytest

from server.engine_client.reservation import Reservation
from server.http.errors import APIError, QueueFullError
from server.tenants import ANYBODY

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
    async with asyncio.timeout(5):
        await reservation.wait_for_start(60)
    assert not reservation.is_waiting


async def test_waiting_ends_when_all_choices_have_ended(reservation: Reservation) -> None:
    asyncio.get_running_loop().call_later(0.01, reservation.release)
    async with asyncio.timeout(5):
        await reservation.wait_for_start(60)
