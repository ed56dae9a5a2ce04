"""Tenants take turns in proportion to their weights, and no slot is lost."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tenants import Tenant
from server.text.turns import MAX_IDLE_TENANTS, Turns
from tests.support.examples import num_examples

NAMES = ("a", "b", "c")


class Clock:
    """Stands still but while work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def work(
    turns: Turns, tenant: Tenant, order: list[str], clock: Clock, seconds: float = 1.0, expected: float = 1.0
) -> None:
    async with turns.turn(tenant, expected):
        order.append(tenant.name)
        clock.now += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize("guess", [0.0, 1.0, 10.0])
@pytest.mark.parametrize(("cost", "weight", "expected"), [(1, 1.0, 30), (2, 1.0, 15), (1, 3.0, 90), (4, 2.0, 15)])
def test_turns_follow_the_time_they_take_and_weights(cost: float, weight: float, expected: int, guess: float) -> None:
    """While the other tenant has 30 turns of 1 s, one with weight w and turns of c seconds has 30 w / c.

    What was expected of them makes no difference.
    """
    order: list[str] = []

    async def run() -> None:
        clock = Clock()
        turns = Turns(1, clock)
        tasks = [
            asyncio.create_task(work(turns, tenant, order, clock, each, guess))
            for _ in range(200)
            for tenant, each in ((Tenant(name="a"), 1), (Tenant(name="b", weight=weight), cost))
        ]
        await asyncio.gather(*tasks)

    asyncio.run(run())
    first = order[: [index for index, name in enumerate(order) if name == "a"][30]]
    assert Counter(first)["b"] == pytest.approx(expected, abs=2)


def test_idle_time_saves_up_no_turns() -> None:
    order: list[str] = []

    async def run() -> None:
        clock = Clock()
        turns = Turns(1, clock)
        for _ in range(50):
            await work(turns, Tenant(name="busy"), order, clock)
        busy = [asyncio.create_task(work(turns, Tenant(name="busy"), order, clock)) for _ in range(10)]
        idle = [asyncio.create_task(work(turns, Tenant(name="idle"), order, clock)) for _ in range(10)]
        await asyncio.gather(*busy, *idle)

    asyncio.run(run())
    assert Counter(order[50:60])["busy"] >= 4


STEPS = st.tuples(st.sampled_from(["start", "end", "cancel"]), st.sampled_from(NAMES), st.integers(0, 20))


class Holders:
    """Tasks that hold slots until they are told to end."""

    def __init__(self, num_slots: int) -> None:
        self.running: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._num_slots = num_slots
        self._turns = Turns(num_slots)

    def start(self, name: str) -> None:
        self.tasks.append(asyncio.create_task(self._hold(name)))

    async def check(self) -> None:
        """No more run than there are slots, and none waits while a slot is free."""
        for _ in range(4):
            await asyncio.sleep(0)
        assert len(self.running) == min(self._num_slots, sum(not task.done() for task in self.tasks))

    async def _hold(self, name: str) -> None:
        async with self._turns.turn(Tenant(name=name), 1.0):
            ended = asyncio.Event()
            self.running.append(ended)
            try:
                await ended.wait()
            finally:
                self.running.remove(ended)


async def follow(holders: Holders, steps: list[tuple[str, str, int]]) -> None:
    for action, name, number in steps:
        if action == "start":
            holders.start(name)
        elif action == "end" and holders.running:
            holders.running[number % len(holders.running)].set()
        elif action == "cancel" and holders.tasks:
            holders.tasks[number % len(holders.tasks)].cancel()
        if number % 2:  # otherwise several things happen at once
            await holders.check()
    for task in holders.tasks:
        task.cancel()
    await holders.check()
    for name in NAMES * 2:
        holders.start(name)
    await holders.check()
    for task in holders.tasks:
        task.cancel()


@settings(max_examples=num_examples(60, 400))
@given(num_slots=st.integers(1, 3), steps=st.lists(STEPS, max_size=60))
def test_any_order_of_work_and_cancellation_keeps_all_slots(num_slots: int, steps: list[tuple[str, str, int]]) -> None:
    async def run() -> None:
        await follow(Holders(num_slots), steps)

    asyncio.run(run())


def test_little_is_kept_of_tenants_that_have_gone() -> None:
    async def visit(turns: Turns, num_tenants: int) -> int:
        for number in range(num_tenants):
            async with turns.turn(Tenant(name=str(number)), 1.0):
                pass
        return len(turns._had)

    async def run() -> None:
        turns = Turns(2)
        assert await visit(turns, 10) == 0
        async with turns.turn(Tenant(name="long"), 1.0):
            assert await visit(turns, 5_000) <= MAX_IDLE_TENANTS + 1

    asyncio.run(run())
