"""Engine clients connected to a fake engine, also one that is replaced, and requests for them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.shared.messages import SamplingParams, Submit, TokenEvent
from server.engine_client.admission import AdmissionLimits
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import EngineOptions
from server.engine_client.streams import RequestStream
from server.http.errors import APIError
from server.metrics import Metrics
from server.part_table import load_module
from server.settings.process_configs import EngineProcess
from tests.support.fake_engine import FakeEngineConfig, MortalEngine

PROMPT = list(b"hi")
SLOW: dict[str, Any] = {"max_num_seqs": 1, "step_seconds": 0.01, "endless": True}


@asynccontextmanager
async def connected(
    address: str | Sequence[str],
    *,
    step_timeout: float = 60.0,
    engine_pid: int | None = None,
    can_restart: bool = False,
    metrics: Metrics | None = None,
    **limits: float,
) -> AsyncIterator[EngineClient]:
    """Start a client of the engine at `address`, or of several, and close it at the end. `limits`: of admission."""
    defaults: dict[str, Any] = {"max_queued_requests": 4, "queue_timeout": 60.0, "request_timeout": 60.0}
    addresses = [address] if isinstance(address, str) else address
    client = (EngineClient if len(addresses) == 1 else load_module("data_parallel", "client").GroupClient)(
        [EngineProcess(each, engine_pid) for each in addresses],
        EngineOptions(step_timeout=step_timeout, can_restart=can_restart),
        limits=AdmissionLimits(**defaults | limits),
        metrics=metrics or Metrics("lightwell_", "m"),
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def ready(address: str | Sequence[str], **options: object) -> AsyncIterator[EngineClient]:
    """Start a client and wait until its engines are ready."""
    async with connected(address, **options) as client:  # type: ignore[arg-type]
        await until(lambda: all(engine.liveness.is_ready for engine in client.engines))
        yield client


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition()` is true. Fail after about a minute, which is for hangs only."""
    for _ in range(12_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not happen in time")


def request(request_id: str = "r", *, n: int = 1, max_tokens: int = 100) -> Submit:
    params = SamplingParams(max_tokens=max_tokens)
    return Submit(request_id=request_id, prompt_token_ids=PROMPT, params=params, arrival=time.monotonic(), n=n)


async def read(stream: RequestStream) -> list[TokenEvent]:
    """Return all events of a stream."""
    return [event async for batch in stream for event in batch]


async def read_error(stream: RequestStream, kind: type[APIError], match: str | None = None) -> APIError:
    """Read a stream that fails, and return its error."""
    with pytest.raises(kind, match=match) as caught:
        await read(stream)
    return caught.value


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """Return the value of a metric of a client's first engine."""
    own = {"model_name": "m", "engine": "0", **labels}
    return metrics.registry.get_sample_value(f"lightwell_{name}", own) or 0.0


def tokens(events: list[TokenEvent], index: int = 0) -> list[int]:
    """Return the token ids of one choice."""
    return [token_id for event in events if event.index == index for token_id in event.token_ids]


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
