"""Tests of the state of the engine: loading, ready, dead."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain, repeat
from unittest.mock import Mock

import msgspec
import pytest

from engine.shared.messages import HEARTBEAT_SECONDS
from server.engine_client.client import EngineClient
from server.engine_client.liveness import CHECK_SECONDS, MISSED_HEARTBEATS, EngineLiveness
from server.http.errors import EngineDeadError, EngineUnavailableError
from server.processes.supervisor_channel import MAX_WAIT_FACTOR
from tests.support.engine_clients import connected, read, ready, request, until
from tests.support.engine_info import ENGINE_INFO
from tests.support.fake_engine import FakeEngineConfig, MortalEngine
from tests.support.turned_loop import standing_still, turn

pytestmark = pytest.mark.anyio


async def test_death_of_the_engine_ends_every_stream_once(address: str) -> None:
    """The end of its process is noticed at once, by the pidfd."""
    config = FakeEngineConfig(address=address, endless=True, step_seconds=0.01)
    with MortalEngine(config) as engine:
        async with ready(address) as client:
            streams = [client.submit(request(f"{i}", n=2, max_tokens=100_000)) for i in range(3)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            await until(lambda: all(stream.choices[0].num_output_tokens for stream in streams))
            engine.kill()
            results = await asyncio.gather(*readers, return_exceptions=True)
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert client.engines[0].liveness.dead_reason == "its process has ended"
            assert client.died.is_set()
            assert not client.is_healthy
            assert not client.is_alive
            assert client.num_in_flight == 0
            assert client.engines[0].stats.num_running == 0
            with pytest.raises(EngineUnavailableError):
                client.reserve(1)
            for stream in streams:
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)


async def test_death_while_loading_is_noticed_by_the_pidfd(address: str) -> None:
    with MortalEngine(FakeEngineConfig(address=address, never_ready=True)) as engine:
        async with connected(address, engine_pid=engine.pid) as client:
            engine.kill()
            await until(client.died.is_set)
        async with connected(address, engine_pid=engine.pid) as client:  # it has ended already
            assert client.died.is_set()


STEP_TIMEOUT = 2.0
LIMIT = STEP_TIMEOUT + MISSED_HEARTBEATS * HEARTBEAT_SECONDS


def new_liveness(step_timeout: float, pid: int, can_restart: bool = False) -> EngineLiveness:
    """Return the state of an engine that is ready."""
    liveness = EngineLiveness(
        step_timeout=step_timeout, engine_pid=pid, can_restart=can_restart, on_loss=lambda: None, on_death=lambda: None
    )
    liveness.start()
    liveness.set_ready(msgspec.structs.replace(ENGINE_INFO, pid=pid))
    return liveness


@asynccontextmanager
async def watched() -> AsyncIterator[EngineLiveness]:
    """The state of a ready engine that has just sent a message; it is this process. Only `turn` lets time pass."""
    liveness = new_liveness(STEP_TIMEOUT, os.getpid())
    with standing_still():
        watching = asyncio.create_task(liveness.watch_heartbeat())
        await asyncio.sleep(0)
        yield liveness
        watching.cancel()
        liveness.close()


async def checks(seconds: float) -> None:
    """Let time pass with all checks of the heartbeat."""
    for _ in range(round(seconds / CHECK_SECONDS)):
        await turn(CHECK_SECONDS)


@pytest.fixture
def cpu_waits(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Returns for how long the threads of the engine have waited for a CPU."""
    waits = Mock(return_value={})
    monkeypatch.setattr("server.processes.supervisor_channel.cpu_waits", waits)
    return waits


@pytest.mark.checklist("F06")
async def test_only_silence_counts(cpu_waits: Mock) -> None:
    async with watched() as liveness:
        for _ in range(5):  # no steps, but heartbeats
            await checks(LIMIT - CHECK_SECONDS)
            assert liveness.is_healthy
            liveness.was_heard = True
        await checks(LIMIT)
        assert liveness.is_alive
        await checks(CHECK_SECONDS)
        assert liveness.dead_reason == "no step for more than 5 seconds"


async def test_an_engine_that_waits_for_a_cpu_does_not_hang(cpu_waits: Mock) -> None:
    """Unless it waits forever: one thread may hang while another one waits."""
    loop = asyncio.get_running_loop()
    cpu_waits.side_effect = lambda _pid: {1: 7.0, 2: loop.time()}
    async with watched() as liveness:
        await checks(3 * LIMIT)
        assert liveness.is_healthy
        cpu_waits.side_effect = lambda _pid: {1: 7.0, 2: 0.0}
        await checks(LIMIT)
        assert not liveness.is_alive
    cpu_waits.side_effect = lambda _pid: {1: loop.time()}
    async with watched() as liveness:
        await checks(MAX_WAIT_FACTOR * LIMIT)
        assert liveness.is_healthy
        await checks(CHECK_SECONDS)
        assert not liveness.is_alive


@pytest.mark.checklist("F06")
async def test_a_hang_is_noticed_after_checks_have_failed(cpu_waits: Mock) -> None:
    cpu_waits.side_effect = chain([RuntimeError()] * 3, repeat({}))
    async with watched() as liveness:
        await checks(2 * LIMIT)
        assert not liveness.is_alive


async def test_a_death_is_announced_though_its_handling_fails(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(client.engines[0], "fail_streams", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            client.engines[0].liveness.lose("it hangs")
    assert client.died.is_set()


async def test_a_process_that_has_the_id_of_an_engine_that_has_ended_is_not_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "pidfd_open", Mock(side_effect=OSError))
    monkeypatch.setattr(os, "kill", kill := Mock())
    liveness = new_liveness(1.0, 7, can_restart=True)
    liveness.engine_started(8)
    assert (liveness.is_restarting, kill.called) == (True, False)
    liveness.lose("it hangs")  # the new one
    kill.assert_called_once_with(8, signal.SIGKILL)
