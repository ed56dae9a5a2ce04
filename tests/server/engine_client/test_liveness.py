"""Tests of the state of the engine: loading, ready, dead."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable

import msgspec
import pytest

from engine.shared.messages import Hello
from server.engine_client.liveness import EngineLiveness
from server.http.errors import APIError, EngineDeadError, EngineUnavailableError
from tests.support.engine_clients import connected, read, ready, request, until
from tests.support.engine_info import ENGINE_INFO
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, FakeEngineProcess

pytestmark = pytest.mark.anyio


async def test_ready_reports_the_properties_of_the_engine(fake_engine: FakeEngine) -> None:
    async with connected(fake_engine.config.address) as client:
        assert not client.is_ready
        assert not client.is_healthy
        assert client.is_alive
        await until(lambda: client.is_healthy)
        assert client.ready_info().max_model_len == fake_engine.config.max_model_len
        assert isinstance(fake_engine.received[0], Hello)


async def test_death_of_the_engine_ends_every_stream_once(address: str) -> None:
    config = FakeEngineConfig(address=address, endless=True, step_seconds=0.01)
    with FakeEngineProcess(config) as engine:
        async with ready(address) as client:
            streams = [client.submit(request(f"{i}", n=2, max_tokens=100_000)) for i in range(3)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            await until(lambda: all(stream.choices[0].num_output_tokens for stream in streams))
            os.kill(engine.pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.gather(*readers, return_exceptions=True)
            assert time.monotonic() - killed < 1
            assert all(isinstance(result, EngineDeadError) for result in results)
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
    with FakeEngineProcess(FakeEngineConfig(address=address, never_ready=True)) as engine:
        async with connected(address, engine_pid=engine.pid) as client:
            os.kill(engine.pid, signal.SIGKILL)
            async with asyncio.timeout(1):
                await client.died.wait()


async def test_a_process_that_has_already_ended_is_dead(address: str) -> None:
    with FakeEngineProcess(FakeEngineConfig(address=address)) as engine:
        engine.kill()
    async with connected(address, engine_pid=engine.pid) as client:
        assert client.died.is_set()


@pytest.mark.checklist("F06")
async def test_an_engine_that_hangs_is_dead_after_the_step_timeout(
    fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    async with ready(fake_engine.config.address, step_timeout=0.7) as client:
        fake_engine.pause()
        stream = client.submit(request())
        await asyncio.sleep(2)  # no steps, but heartbeats
        assert client.is_healthy
        fake_engine.hang()
        await until(lambda: not client.is_healthy)
        with pytest.raises(EngineDeadError):
            await read(stream)
        assert client.died.is_set()


async def test_a_pause_of_all_processes_is_no_hang(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step in progress may take as long as it would have without the pause."""
    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    with FakeEngineProcess(FakeEngineConfig(address=address)) as engine:
        async with ready(address, step_timeout=1.5) as client:
            os.kill(engine.pid, signal.SIGSTOP)
            time.sleep(4)  # noqa: ASYNC251  (the event loop is paused, too)
            await asyncio.sleep(1.2)
            os.kill(engine.pid, signal.SIGCONT)
            await asyncio.sleep(1)
            assert client.is_healthy
            os.kill(engine.pid, signal.SIGSTOP)
            async with asyncio.timeout(4):
                await client.died.wait()


async def test_an_engine_that_waits_for_a_cpu_does_not_hang(
    fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    clock: Callable[[], float] = time.monotonic  # a thread that always waits
    monkeypatch.setattr("server.processes.run_queue.cpu_waits", lambda _pid: {1: 7.0, 2: clock()})
    async with ready(fake_engine.config.address, step_timeout=1.5, engine_pid=os.getpid()) as client:
        fake_engine.hang()
        await asyncio.sleep(4)
        assert client.is_healthy
        ended = time.monotonic()
        clock = lambda: ended  # noqa: E731
        async with asyncio.timeout(4):
            await client.died.wait()


async def test_an_engine_that_waits_for_a_cpu_forever_is_dead(
    fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread may hang while another one waits."""
    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    monkeypatch.setattr("server.engine_client.liveness.MAX_WAIT_FACTOR", 2)
    monkeypatch.setattr("server.processes.run_queue.cpu_waits", lambda _pid: {1: time.monotonic()})
    async with ready(fake_engine.config.address, step_timeout=1.5, engine_pid=os.getpid()) as client:
        fake_engine.hang()
        await asyncio.sleep(3)
        assert client.is_healthy
        async with asyncio.timeout(4):
            await client.died.wait()


@pytest.mark.checklist("F06")
async def test_a_hang_is_noticed_after_checks_have_failed(
    fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0

    def fail_at_first(_pid: int) -> dict[int, float]:
        nonlocal num_calls
        num_calls += 1
        if num_calls <= 3:
            raise RuntimeError
        return {}

    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    monkeypatch.setattr("server.processes.run_queue.cpu_waits", fail_at_first)
    async with ready(fake_engine.config.address, step_timeout=1.5, engine_pid=os.getpid()) as client:
        fake_engine.hang()
        async with asyncio.timeout(6):
            await client.died.wait()
        assert num_calls > 3


async def test_a_death_is_announced_though_its_handling_fails(
    fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_error: APIError) -> None:
        raise MemoryError

    async with connected(fake_engine.config.address) as client:
        with monkeypatch.context() as patch:
            patch.setattr(client.engines[0], "fail_streams", fail)
            with pytest.raises(MemoryError):
                client.engines[0].liveness.lose("it hangs")
        assert client.died.is_set()


async def test_a_process_that_has_the_id_of_an_engine_that_has_ended_is_not_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_pid: int) -> int:
        raise OSError

    monkeypatch.setattr(os, "pidfd_open", fail)
    process = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220
    liveness = EngineLiveness(
        step_timeout=1.0, engine_pid=process.pid, can_restart=True, on_loss=lambda: None, on_death=lambda: None
    )
    liveness.start()
    liveness.set_ready(msgspec.structs.replace(ENGINE_INFO, pid=process.pid))
    liveness.engine_started(os.getpid())
    assert liveness.is_restarting
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.wait()
