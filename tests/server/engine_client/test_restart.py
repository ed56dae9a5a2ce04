"""Tests of a client whose engine dies and is replaced by another one at the same address."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from engine.shared.messages import AdapterDone, FinishReason, LoraAdapter, Submit
from server.engine_client.client import EngineClient
from server.engine_client.streams import RequestStream
from server.http.errors import AdapterLostError, EngineDeadError, EngineUnavailableError, QueueTimeoutError
from server.metrics import Metrics
from tests.support.engine_clients import read, ready, request, tokens, until
from tests.support.fake_engine import FakeEngineConfig, FakeEngineProcess, make_adapter
from tests.support.processes import wait_for_end_of

pytestmark = pytest.mark.anyio

SLOW: dict[str, Any] = {"max_num_seqs": 1, "step_seconds": 0.01, "endless": True}


class Engines:
    """Engine processes at one address, and a client that can do without one for a while."""

    def __init__(self, address: str, client: EngineClient, first: FakeEngineProcess) -> None:
        self.client = client
        self.current = first
        self._address = address

    def kill(self) -> None:
        self.current.kill()

    async def lose(self) -> None:
        """Kill the engine and wait until the client has noticed."""
        self.kill()
        await until(lambda: self.client.is_restarting)

    async def replace(self, **config: Any) -> None:
        """Start another engine and tell the client."""
        self.kill()
        self.current = FakeEngineProcess(
            FakeEngineConfig(address=self._address, **({"max_num_seqs": 1} | config))
        ).__enter__()
        self.client.engines[0].engine_started(self.current.pid)

    async def run_and_wait(self) -> tuple[RequestStream, RequestStream]:
        """Return the stream of a request that has tokens, and one of a request that waits. The engine must be SLOW."""
        running = self.client.submit(request("running", max_tokens=100_000))
        await until(lambda: running.choices[0].num_output_tokens)
        return running, self.client.submit(request("waiting", n=2, max_tokens=5))


@asynccontextmanager
async def engines(address: str, options: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:
        first = FakeEngineProcess(FakeEngineConfig(address=address, **config)).__enter__()
        client = await stack.enter_async_context(
            ready(address, engine_pid=first.pid, can_restart=True, **(options or {}))
        )
        result = Engines(address, client, first)
        stack.callback(result.kill)
        yield result


async def test_requests_without_a_token_survive(address: str) -> None:
    metrics = Metrics("lightwell_", "m")
    labels = {"model_name": "m", "engine": "0"}

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"lightwell_{name}", labels)

    async with engines(address, {"metrics": metrics}, **SLOW) as both:
        client = both.client
        running, waiting = await both.run_and_wait()
        await both.lose()
        with pytest.raises(EngineDeadError):
            await read(running)
        assert (client.is_healthy, client.is_alive, client.num_restarts) == (False, True, 1)
        late = client.submit(request("late"))
        assert client.num_in_flight == 3
        assert (value("num_requests_waiting"), value("num_requests_running")) == (3, 0)
        await both.replace()
        events = await asyncio.gather(read(waiting), read(late))
        assert bytes(tokens(events[0], 0)) == bytes(tokens(events[0], 1)) == b"Hello"
        assert bytes(tokens(events[1])[:-1]) == b"Hello, world!"
        assert client.is_healthy
        assert client.num_in_flight == 0
        assert value("engine_restarts_total") == 1
        assert not client.died.is_set()


async def begin(*streams: RequestStream) -> None:
    """Wait until the engine has begun with requests."""
    await until(lambda: all(stream.reservation.started is not None for stream in streams))


@pytest.mark.checklist("E11", "F05")
async def test_the_queue_timeout_goes_on_after_a_restart(address: str) -> None:
    """It counts from the arrival, also for requests that the lost engine had begun with."""
    async with engines(address, {"queue_timeout": 2.0}, num_prompt_steps=10**6, step_seconds=0.01) as both:
        begun = [both.client.submit(request(f"{number}")) for number in range(2)]
        await begin(*begun)
        await both.lose()
        assert all(stream.reservation.started is None for stream in begun)
        for stream in begun:
            with pytest.raises(QueueTimeoutError, match="2 seconds"):
                await read(stream)
        assert both.client.num_in_flight == 0


async def test_the_queue_timeout_ends_when_the_next_engine_begins(address: str) -> None:
    slow: dict[str, Any] = {"max_num_seqs": 1, "num_prompt_steps": 10**6, "step_seconds": 0.01}
    async with engines(address, {"queue_timeout": 3.0}, **slow) as both:
        stream = both.client.submit(request(max_tokens=40))
        await begin(stream)
        await both.replace(num_prompt_steps=100, step_seconds=0.05, endless=True)
        assert len(tokens(await read(stream))) == 40


@pytest.mark.checklist("F05")
async def test_a_request_that_engines_die_of_is_not_given_to_a_third(address: str) -> None:
    """Those that only waited beside it are."""
    slow: dict[str, Any] = {"max_num_seqs": 1, "num_prompt_steps": 10**6, "step_seconds": 0.01}
    async with engines(address, **slow) as both:
        deadly, other = both.client.submit(request("deadly")), both.client.submit(request("other"))
        await begin(deadly)
        await both.lose()
        assert deadly.waiting
        await both.replace(**slow)
        await begin(deadly)
        await both.lose()
        with pytest.raises(EngineDeadError):
            await read(deadly)
        await both.replace()
        assert bytes(tokens(await read(other))[:-1]) == b"Hello, world!"


async def test_engines_that_die_while_they_load(address: str) -> None:
    async with engines(address, **SLOW) as both:
        _, waiting = await both.run_and_wait()
        for _ in range(2):
            await both.replace(never_ready=True)
            await asyncio.sleep(0.3)
        assert both.client.num_restarts == 1
        await both.replace()
        assert bytes(tokens(await read(waiting))) == b"Hello"
        await both.lose()
        assert both.client.num_restarts == 2


async def test_a_request_that_ends_meanwhile_is_not_sent_again(address: str) -> None:
    async with engines(address, **SLOW) as both:
        running, waiting = await both.run_and_wait()
        await both.lose()
        await waiting.aclose()
        assert both.client.num_in_flight == 0
        await both.replace()
        await until(lambda: both.client.is_ready)
        await read(both.client.submit(request("after")))
        assert both.client.engines[0].stats.prompt_tokens_total == len(request().prompt_token_ids)
        with pytest.raises(EngineDeadError):
            await read(running)


async def test_an_engine_that_hangs_is_killed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    async with engines(address, {"step_timeout": 0.7}, **SLOW) as both:
        running, waiting = await both.run_and_wait()
        os.kill(both.current.pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError):
            await read(running)
        wait_for_end_of(both.current.pid)
        await both.replace()
        assert bytes(tokens(await read(waiting))) == b"Hello"


async def test_the_news_of_another_engine_may_come_first(address: str) -> None:
    async with engines(address, **SLOW) as both:
        running, waiting = await both.run_and_wait()
        await both.replace()  # without a turn of the event loop since the first one died
        with pytest.raises(EngineDeadError):
            await read(running)
        assert bytes(tokens(await read(waiting))) == b"Hello"


async def test_no_other_engine(address: str) -> None:
    async with engines(address, **SLOW) as both:
        _, waiting = await both.run_and_wait()
        await both.lose()
        both.client.engines[0].liveness.mark_dead("five deaths")
        with pytest.raises(EngineDeadError):
            await read(waiting)
        with pytest.raises(EngineUnavailableError):
            both.client.reserve(1)
        assert both.client.died.is_set()
        assert (both.client.is_alive, both.client.restarting_since) == (False, None)


async def test_an_engine_with_other_properties_is_not_used(address: str) -> None:
    async with engines(address, **SLOW) as both:
        _, waiting = await both.run_and_wait()
        await both.replace(max_model_len=100)
        with pytest.raises(EngineDeadError):
            await read(waiting)
        assert both.client.died.is_set()


def with_adapter(adapter: LoraAdapter, request_id: str) -> Submit:
    message = request(request_id, max_tokens=3)
    return msgspec.structs.replace(message, lora_name=adapter.name, lora_fingerprint=adapter.fingerprint)


async def test_adapters_are_loaded_again(address: str) -> None:
    chess = make_adapter("chess")
    async with engines(address, adapters=[chess], max_loras=2, **SLOW) as both:
        client = both.client
        await client.unload_adapter("chess")
        await client.load_adapter("go", "/go", False)
        go = client.adapters["go"]
        running, _ = await both.run_and_wait()
        waiting = client.submit(with_adapter(go, "a"))
        await both.lose()
        assert client.adapters == {"go": go}
        with pytest.raises(EngineUnavailableError, match="being restarted"):
            await client.load_adapter("sql", "/sql", False)
        late = client.submit(with_adapter(go, "b"))
        await both.replace(adapters=[chess], max_loras=2)
        for stream in (waiting, late):
            events = await read(stream)
            assert events[-1].finish_reason is FinishReason.LENGTH
        assert client.adapters == {"go": go}
        await client.load_adapter("sql", "/sql", False)
        assert list(client.adapters) == ["go", "sql"]
        await running.aclose()


@pytest.mark.parametrize("is_temporary", [True, False])
async def test_an_adapter_that_cannot_be_loaded_again(
    address: str, is_temporary: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with engines(address, max_loras=2, **SLOW) as both:
        client = both.client
        await client.load_adapter("go", "/go", False)
        _, waiting = await both.run_and_wait()
        lost = client.submit(with_adapter(client.adapters["go"], "lost"))
        await both.replace(
            max_loras=2, adapter_error=AdapterDone(request_id="", error="no such file", is_temporary=is_temporary)
        )
        with pytest.raises(AdapterLostError, match="'go' could not be loaded again"):
            await read(lost)
        assert bytes(tokens(await read(waiting))) == b"Hello"
        assert client.adapters == {}
        assert "the LoRA adapter go is lost: no such file" in caplog.text


async def test_an_engine_that_dies_while_adapters_are_loaded_again(address: str) -> None:
    async with engines(address, max_loras=2, **SLOW) as both:
        client = both.client
        await client.load_adapter("go", "/go", False)
        go = client.adapters["go"]
        await both.lose()
        waiting = client.submit(with_adapter(go, "a"))
        await both.replace(max_loras=2, ignores_adapters=True)
        await asyncio.sleep(0.5)
        client.drain()  # must not end the restart
        assert client.is_restarting
        await both.replace(max_loras=2)
        assert (await read(waiting))[-1].finish_reason is FinishReason.LENGTH
        assert client.adapters == {"go": go}


async def test_a_restarted_engine_that_cannot_load_is_not_the_last(address: str) -> None:
    """The supervisor decides how often another one is started."""
    async with engines(address, max_num_seqs=1) as both:
        await both.lose()
        await both.replace(load_failure="no memory")
        await asyncio.sleep(0.5)
        assert both.client.is_restarting
        await both.replace()
        await until(lambda: both.client.is_ready)
        await read(both.client.submit(request()))
