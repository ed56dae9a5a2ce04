"""Tests of a client whose engine dies and is replaced by another one at the same address."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from engine.shared.messages import AdapterDone, FinishReason, LoadFailed, LoraAdapter, Submit
from server.engine_client.client import EngineClient
from server.engine_client.liveness import CHECK_SECONDS
from server.engine_client.streams import RequestStream
from server.http.errors import AdapterLostError, EngineDeadError, EngineUnavailableError, QueueTimeoutError
from server.metrics import Metrics
from tests.support.engine_clients import read, ready, request, tokens, until
from tests.support.fake_engine import FakeEngineConfig, MortalEngine, make_adapter
from tests.support.turned_loop import turn

pytestmark = pytest.mark.anyio

SLOW: dict[str, Any] = {"max_num_seqs": 1, "step_seconds": 0.01, "endless": True}
NO_TOKEN: dict[str, Any] = {"max_num_seqs": 1, "num_prompt_steps": 10**9, "step_seconds": 0.01}


class Engines:
    """Engine processes at one address, and a client that can do without one for a while."""

    def __init__(self, client: EngineClient, engine: MortalEngine) -> None:
        self.client = client
        self.engine = engine

    async def lose(self) -> None:
        """Kill the engine and wait until the client has noticed."""
        self.engine.kill()
        await until(lambda: self.client.engines[0].liveness._pidfd is None)

    async def replace(self, **config: Any) -> None:
        """Start another engine and tell the client."""
        self.client.engines[0].engine_started(self.engine.replace(**({"max_num_seqs": 1} | config)))

    async def run_and_wait(self) -> tuple[RequestStream, RequestStream]:
        """Return the stream of a request that has tokens, and one of a request that waits. The engine must be SLOW."""
        running = self.client.submit(request("running", max_tokens=100_000))
        await until(lambda: running.choices[0].num_output_tokens)
        return running, self.client.submit(request("waiting", n=2, max_tokens=5))


@asynccontextmanager
async def engines(address: str, options: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Engines]:
    with MortalEngine(FakeEngineConfig(address=address)) as engine:
        pid = engine.replace(**config)
        async with ready(address, engine_pid=pid, can_restart=True, **(options or {})) as client:
            yield Engines(client, engine)


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
        with pytest.raises(QueueTimeoutError, match="500 seconds"):
            await read(second)
        both.engine.config.num_prompt_steps = 0
        assert len(tokens(await read(first))) == 40
        both.engine.config.num_prompt_steps = 10**9
        third = both.client.submit(request("third"))
        await begin(third)
        await turn(400.0)
        await both.lose()
        await turn(200.0)
        with pytest.raises(QueueTimeoutError):
            await read(third)
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
        with pytest.raises(EngineDeadError):
            await read(deadly)
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
        assert (both.client.is_restarting, both.client.num_restarts) == (True, 1)
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
        assert [submit.request_id for submit in both.engine.submits] == ["after"]
        with pytest.raises(EngineDeadError):
            await read(running)


async def test_an_engine_that_hangs_is_killed(address: str) -> None:
    async with engines(address, {"step_timeout": 1.0}, **SLOW) as both:
        running, waiting = await both.run_and_wait()
        both.engine.hang()
        while not both.client.is_restarting:
            await turn(CHECK_SECONDS)
            await asyncio.sleep(0.001)
        assert both.engine.exit_code == -signal.SIGKILL
        with pytest.raises(EngineDeadError):
            await read(running)
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
    """Also if the engine that loads them dies meanwhile."""
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
        await both.replace(max_loras=2, ignores_adapters=True)
        await until(lambda: client.engines[0].adapters._changes)
        client.drain()  # must not end the restart
        assert client.is_restarting
        client._admission.drain_requested.clear()
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
