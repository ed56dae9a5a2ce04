"""The client of an engine that dies and is replaced by another one at the same address."""

import asyncio
import signal
from typing import Any

import pytest

from engine.shared.messages import LoadFailed
from server.engine_client.liveness import CHECK_SECONDS
from server.engine_client.streams import RequestStream
from server.http.errors import EngineDeadError, QueueTimeoutError
from server.metrics import Metrics
from tests.support.engine_clients import SLOW, engines, read, read_error, request, sample, tokens, until
from tests.support.turned_loop import turn

pytestmark = pytest.mark.anyio

NO_TOKEN: dict[str, Any] = {"max_num_seqs": 1, "num_prompt_steps": 10**9, "step_seconds": 0.01}


async def test_requests_without_a_token_survive(address: str) -> None:
    metrics = Metrics("lightwell_", "m")
    async with engines(address, {"metrics": metrics}, **SLOW) as both:
        client = both.client
        running, waiting = await both.run_and_wait()
        await both.lose()
        await read_error(running, EngineDeadError)
        assert (client.is_healthy, client.is_alive, client.num_restarts) == (False, True, 1)
        late = client.submit(request("late"))
        assert client.num_in_flight == 3
        assert (sample(metrics, "num_requests_waiting"), sample(metrics, "num_requests_running")) == (3, 0)
        await both.replace()
        events = await asyncio.gather(read(waiting), read(late))
        assert bytes(tokens(events[0], 0)) == bytes(tokens(events[0], 1)) == b"Hello"
        assert bytes(tokens(events[1])[:-1]) == b"Hello, world!"
        assert client.is_healthy
        assert client.num_in_flight == 0
        assert sample(metrics, "engine_restarts_total") == 1
        assert not client.died.is_set()


async def begin(*streams: RequestStream) -> None:
    """Wait until the engine has begun with requests."""
    await until(lambda: all(stream.reservation.started is not None for stream in streams))


@pytest.mark.checklist("E11", "F05")
async def test_the_queue_timeout_goes_on_after_a_restart(address: str) -> None:
    """It counts from the arrival until the next engine begins, also for what the lost engine had begun with."""
    slow = NO_TOKEN | {"endless": True}
    async with engines(address, {"queue_timeout": 500.0, "request_timeout": 1e9}, **slow) as both:
        first, second = [both.client.submit(request(f"{number}", max_tokens=40)) for number in range(2)]
        await begin(first)
        await turn(400.0)
        await both.lose()
        assert first.reservation.started is None
        await both.replace(**slow)
        await begin(first)
        await turn(200.0)
        await read_error(second, QueueTimeoutError, match="500 seconds")
        both.engine.config.num_prompt_steps = 0
        assert len(tokens(await read(first))) == 40
        both.engine.config.num_prompt_steps = 10**9
        third = both.client.submit(request("third"))
        await begin(third)
        await turn(400.0)
        await both.lose()
        await turn(200.0)
        await read_error(third, QueueTimeoutError)
        assert both.client.num_in_flight == 0


@pytest.mark.checklist("F05")
async def test_a_request_that_engines_die_of_is_not_given_to_a_third(address: str) -> None:
    """Those that only waited beside it are."""
    async with engines(address, **NO_TOKEN) as both:
        deadly, other = both.client.submit(request("deadly")), both.client.submit(request("other"))
        await begin(deadly)
        await both.lose()
        assert deadly.waiting
        await both.replace(**NO_TOKEN)
        await begin(deadly)
        await both.lose()
        await read_error(deadly, EngineDeadError)
        await both.replace()
        assert bytes(tokens(await read(other))[:-1]) == b"Hello, world!"


async def test_engines_that_die_or_fail_while_they_load(address: str) -> None:
    """The supervisor decides how often another one is started."""
    async with engines(address, **SLOW) as both:
        _, waiting = await both.run_and_wait()
        await both.lose()
        for _ in range(2):
            await both.replace(never_ready=True)
            await both.lose()
        both.client.engines[0]._on_message(LoadFailed("no memory"))
        assert (bool(both.client.restarting_since), both.client.num_restarts) == (True, 1)
        await both.replace()
        assert bytes(tokens(await read(waiting))) == b"Hello"
        await both.lose()
        assert both.client.num_restarts == 2


async def test_a_request_that_ends_meanwhile_is_not_sent_again(address: str) -> None:
    async with engines(address, **SLOW) as both:
        running, waiting = await both.run_and_wait()
        await both.lose()
        waiting.close()
        assert both.client.num_in_flight == 0
        await both.replace()
        await until(lambda: both.client.is_ready)
        await read(both.client.submit(request("after")))
        assert [submit.request_id for submit in both.engine.submits] == ["after"]
        await read_error(running, EngineDeadError)


async def test_an_engine_that_hangs_is_killed(address: str) -> None:
    async with engines(address, {"step_timeout": 1.0}, **SLOW) as both:
        running, waiting = await both.run_and_wait()
        both.engine.hang()
        while not both.client.restarting_since:
            await turn(CHECK_SECONDS)
            await asyncio.sleep(0.001)
        assert both.engine.exit_code == -signal.SIGKILL
        await read_error(running, EngineDeadError)
        await both.replace()
        assert bytes(tokens(await read(waiting))) == b"Hello"


async def test_an_engine_with_other_properties_is_not_used(address: str) -> None:
    async with engines(address, **SLOW) as both:
        _, waiting = await both.run_and_wait()
        await both.replace(max_model_len=100)
        await read_error(waiting, EngineDeadError)
        assert both.client.died.is_set()
