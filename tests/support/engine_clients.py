"""Engine clients connected to a fake engine, and requests for them."""

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
from server.settings.process_configs import EngineProcess

PROMPT = list(b"hi")


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
    client = EngineClient(
        [EngineProcess(each, engine_pid) for each in ([address] if isinstance(address, str) else address)],
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
