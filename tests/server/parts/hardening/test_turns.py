"""Long texts hold up neither other tenants nor short requests: tenants take turns in proportion to their weights."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.parts.hardening.turns import MAX_IDLE_TENANTS, FairThreads, Turns
from server.tenants import Tenant
from server.text.text_threads import LONG_BYTES
from server.text.tokenizer import Tokenizer
from tests.support.examples import num_examples
from tests.support.serving import RunningServer, wait_until

LONG = "x" * (LONG_BYTES + 1)
KEYS = ("key-a", "key-b")


class SlowTokenizer:
    """Lets the tokenizer of a server take long for long texts: until `go_on` is released, once for each text."""

    def __init__(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.go_on = threading.Semaphore(0)
        self._encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", self.encode)

    def encode(self, text: str, **options: Any) -> list[int]:
        if len(text) > LONG_BYTES:
            self.begun.append(text)
            assert self.go_on.acquire(timeout=60)
            return [97]
        return self._encode(text, **options)


def ask(server: RunningServer, path: str, body: dict[str, Any], key: str = KEYS[0]) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.url + path, json={"model": "tiny"} | body, headers=headers, timeout=30)


@contextmanager
def long_requests(server: RunningServer, count: int) -> Iterator[list[Future[httpx.Response]]]:
    """Send requests with long texts, and wait until the server has them."""
    body = {"prompt": LONG, "max_tokens": 1}
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(ask, server, "/v1/completions", body) for _ in range(count)]
        wait_until(lambda: server.model.client.num_in_flight == count)
        yield waiting


SHORT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
]


def test_short_requests_and_other_tenants_pass_long_ones(roomy: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, other = SlowTokenizer(roomy.model.tokenizer, monkeypatch), "y" * len(LONG)
    with long_requests(roomy, 40) as waiting, ThreadPoolExecutor(1) as pool:
        for path, body in SHORT:
            assert ask(roomy, path, body).status_code == 200
        assert not any(each.done() for each in waiting)
        wait_until(lambda: len(tokenizer.begun) > 0)
        num_threads = len(tokenizer.begun)
        answer = pool.submit(ask, roomy, "/v1/completions", {"prompt": other, "max_tokens": 1}, KEYS[1])
        wait_until(lambda: roomy.model.client.num_in_flight == 41)
        tokenizer.go_on.release(num_threads + 2)
        assert answer.result(60).status_code == 200
        assert tokenizer.begun.index(other) <= num_threads + 1
        tokenizer.go_on.release(40)
        assert {each.result().status_code for each in waiting} == {200}


def test_there_are_as_many_threads_as_cores() -> None:
    """Half as many for long texts, but at least one."""

    async def most_at_once(num_bytes: int, num_cores: int, expected: int) -> int:
        threads, running, most = FairThreads(num_cores), 0, 0
        all_run = threading.Barrier(expected, timeout=60)

        def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            all_run.wait()
            running -= 1

        await asyncio.gather(*(threads.run(Tenant(name="a"), num_bytes, work) for _ in range(12)))
        return most

    for num_cores, num_long in ((1, 1), (4, 2)):
        assert asyncio.run(most_at_once(LONG_BYTES, num_cores, num_cores)) == num_cores
        assert asyncio.run(most_at_once(LONG_BYTES + 1, num_cores, num_long)) == num_long


def test_a_thread_holds_its_turn_when_its_request_is_cancelled() -> None:
    async def run() -> list[str]:
        threads, order = FairThreads(1), list[str]()
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(60)
            order.append("first")

        first = asyncio.ensure_future(threads.run(Tenant(name="a"), 1, work))
        await begun.wait()
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        second = asyncio.ensure_future(threads.run(Tenant(name="b"), 1, lambda: order.append("second")))
        await asyncio.sleep(0)  # in which it would begin

        go_on.set()
        await second
        return order

    assert asyncio.run(run()) == ["first", "second"]


# Turns, of which no slot is lost.


NAMES = ("a", "b", "c")


@asynccontextmanager
async def turn(turns: Turns, tenant: Tenant, expected: float = 1.0) -> AsyncIterator[None]:
    """Hold a slot."""
    start = await turns.acquire(tenant, expected)
    try:
        yield
    finally:
        turns.release(tenant, expected, start)


class Work:
    """Turns of tenants, whose clock stands still but while work is done."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()
        self._turns = Turns(1, lambda: self.now)

    async def do(self, tenant: Tenant, seconds: float = 1.0, expected: float = 1.0) -> None:
        async with turn(self._turns, tenant, expected):
            self.order.append(tenant.name)
            self.now += seconds
            await asyncio.sleep(0)


@pytest.mark.parametrize("guess", [0.0, 1.0, 10.0])
@pytest.mark.parametrize(("cost", "weight", "expected"), [(1, 1.0, 30), (2, 1.0, 15), (1, 3.0, 90), (4, 2.0, 15)])
def test_turns_follow_the_time_they_take_and_weights(cost: float, weight: float, expected: int, guess: float) -> None:
    """While the other tenant has 30 turns of 1 s, one with weight w and turns of c seconds has 30 w / c.

    What was expected of them makes no difference.
    """
    work = Work()

    async def run() -> None:
        a, b = Tenant(name="a"), Tenant(name="b", weight=weight)
        await asyncio.gather(
            *(work.do(each, seconds, guess) for _ in range(200) for each, seconds in ((a, 1), (b, cost)))
        )

    asyncio.run(run())
    first = work.order[: [index for index, name in enumerate(work.order) if name == "a"][30]]
    assert Counter(first)["b"] == pytest.approx(expected, abs=2)


def test_idle_time_saves_up_no_turns() -> None:
    work = Work()

    async def run() -> None:
        for _ in range(50):
            await work.do(Tenant(name="busy"))
        await asyncio.gather(*(work.do(Tenant(name=name)) for name in ("busy", "idle") for _ in range(10)))

    asyncio.run(run())
    assert Counter(work.order[50:60])["busy"] >= 4


STEPS = st.tuples(st.sampled_from(["start", "end", "cancel"]), st.sampled_from(NAMES), st.integers(0, 20))


@settings(max_examples=num_examples(60, 400))
@given(num_slots=st.integers(1, 3), steps=st.lists(STEPS, max_size=60))
def test_any_order_of_work_and_cancellation_keeps_all_slots(num_slots: int, steps: list[tuple[str, str, int]]) -> None:
    """Tasks hold slots until they are told to end."""
    running: list[asyncio.Event] = []

    async def hold(turns: Turns, name: str) -> None:
        async with turn(turns, Tenant(name=name)):
            running.append(ended := asyncio.Event())
            try:
                await ended.wait()
            finally:
                running.remove(ended)

    async def check(tasks: list[asyncio.Task[None]]) -> None:
        """No more run than there are slots, and none waits while a slot is free."""
        for _ in range(4):
            await asyncio.sleep(0)
        assert len(running) == min(num_slots, sum(not task.done() for task in tasks))

    async def run() -> None:
        turns, tasks = Turns(num_slots), list[asyncio.Task[None]]()
        everything_ends = [("cancel all", "", 1), *(("start", name, 0) for name in NAMES * 2), ("", "", 1)]
        for action, name, number in [*steps, *everything_ends]:
            if action == "start":
                tasks.append(asyncio.create_task(hold(turns, name)))
            elif action == "end" and running:
                running[number % len(running)].set()
            elif action == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif action == "cancel all":
                for task in tasks:
                    task.cancel()
            if number % 2:  # otherwise several things happen at once
                await check(tasks)

    asyncio.run(run())  # which cancels what is left


def test_little_is_kept_of_tenants_that_have_gone() -> None:
    async def visit(turns: Turns, num_tenants: int) -> int:
        for number in range(num_tenants):
            async with turn(turns, Tenant(name=str(number))):
                pass
        return len(turns._had)

    async def run() -> None:
        turns = Turns(2)
        assert await visit(turns, 10) == 0
        async with turn(turns, Tenant(name="long")):
            assert await visit(turns, 5_000) <= MAX_IDLE_TENANTS + 1

    asyncio.run(run())
