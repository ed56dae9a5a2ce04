"""A replica with a real server as its child, outside of Ray."""

import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.parts.ray.replica import ForwardedRequest, Replica, ResponseHead
from server.settings.load import load_settings
from tests.support.processes import wait_for_end_of
from tests.support.server_process import MODEL
from tests.support.serving import wait_until

pytestmark = pytest.mark.long

SECONDS = 60.0  # for processes to end, on a busy machine


@pytest.fixture(autouse=True)
def _a_replica_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.parts.ray.replica.FETCH_SECONDS", SECONDS)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)


def supervisor() -> psutil.Process:
    """Return the server of the replica."""
    (found,) = [
        child for child in psutil.Process().children() if "server.parts.run.commands" in " ".join(child.cmdline())
    ]
    return found


def run(model: Path, use: Callable[[Replica], Coroutine[Any, Any, None]], **settings: str) -> None:
    """Start a replica, use it, and stop it. Assert that nothing is left."""

    async def start_and_use() -> list[psutil.Process]:
        small = {"max_model_len": "1024", "kv_cache_memory": "64MiB", "served_model_name": MODEL}
        replica = Replica(load_settings({"model": str(model), **small, **settings}))
        try:
            family = [supervisor(), *supervisor().children(recursive=True)]
            await use(replica)
        finally:
            await replica._http.aclose()
            replica.__del__()
        return family

    family = asyncio.run(start_and_use())
    wait_for_end_of(*[process.pid for process in family], seconds=SECONDS)


def request(body: dict[str, Any] | None = None, path: str = "/v1/completions") -> ForwardedRequest:
    content = b"" if body is None else json.dumps({"model": MODEL} | body).encode()
    headers = [(b"content-type", b"application/json"), (b"x-forwarded-for", b"10.0.0.1")]
    return ForwardedRequest("POST" if body else "GET", path.encode(), headers, content, None, None)


async def metric(replica: Replica, name: str, **labels: str) -> float:
    _, page = await replica.fetch(request(path="/metrics"))
    families = text_string_to_metric_families(page.decode())
    samples = [sample for family in families for sample in family.samples if sample.name == f"lightwell_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def wait_for(replica: Replica, value: float, name: str, **labels: str) -> None:
    async with asyncio.timeout(SECONDS):
        while await metric(replica, name, **labels) != value:
            pass


def test_requests_streams_and_cancellation(smollm2_path: Path) -> None:
    async def use(replica: Replica) -> None:
        head, body = await replica.fetch(request({"prompt": "Once", "max_tokens": 4}))
        assert (head.status, head.replica) == (200, "one")
        assert json.loads(body)["usage"]["completion_tokens"] == 4
        head, _ = await replica.fetch(request(path="/lightwell/v1/steps"))
        assert head.status == 403, "without keys, other machines see nothing of the engine"
        endless = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}
        async with aclosing(replica.respond(request(endless | {"stream": True}))) as parts:
            assert isinstance(await anext(parts), ResponseHead)
            assert isinstance(await anext(parts), bytes)
            assert await metric(replica, "num_requests_running") == 1
        await wait_for(replica, 1, "request_success_total", finished_reason="abort")
        answer = asyncio.create_task(replica.fetch(request(endless)))  # not streamed
        await wait_for(replica, 1, "num_requests_running")
        answer.cancel()
        await wait_for(replica, 2, "request_success_total", finished_reason="abort")
        for target, status in (("/v1/../metrics", 404), ("/healthz?q=\u00e9", 200), ("*", 404)):
            head, _ = await replica.fetch(request(path=target))
            assert (target, head.status) == (target, status)
        head, _ = await replica.fetch(request(path=f"/healthz?{'x' * 70_000}"))
        assert 400 <= head.status < 500

    run(smollm2_path, use)


def api_process() -> psutil.Process:
    (found,) = [child for child in supervisor().children() if "server.main" in " ".join(child.cmdline())]
    return found


def is_refused(path: str) -> bool:
    """Return whether nobody listens at the socket. A killed process does until all its threads have ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(path) == errno.ECONNREFUSED


def test_a_server_that_hangs_or_loses_its_api(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr("server.parts.ray.replica.FETCH_SECONDS", 0.5)

    async def use(replica: Replica) -> None:
        supervisor().suspend()  # so that it does not end
        api = api_process()
        api.suspend()
        async with asyncio.timeout(SECONDS):
            with pytest.raises(TimeoutError):
                await replica.fetch(request(path="/metrics"))
        assert statuses == []
        api.kill()
        wait_until(lambda: is_refused(f"{replica._sockets.path}/api.sock"), SECONDS)
        with pytest.raises(httpx.ConnectError):
            await anext(replica.respond(request(path="/metrics")))
        assert statuses == [1]
        supervisor().resume()

    run(smollm2_path, use)


def test_a_replica_ends_with_its_server(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    async def use(replica: Replica) -> None:
        await replica.check_health()
        endless = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
        async with aclosing(replica.respond(request(endless))) as parts:
            await anext(parts)
            supervisor().kill()
            with pytest.raises(httpx.TransportError):
                [_ async for _ in parts]
        wait_until(lambda: statuses == [1], SECONDS)

    run(smollm2_path, use)
    assert statuses == [1], "stopping it is another end"


def test_a_server_that_cannot_start_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def use(replica: Replica) -> None:
        pytest.fail("it has started")

    with pytest.raises(RuntimeError, match="exit status 1; the replica's log says why"):
        run(tmp_path / "missing.gguf", use)
    assert "missing.gguf" in capfd.readouterr().err
