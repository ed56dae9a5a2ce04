"""Health endpoints in each state of the engine and of the server."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.tenants import Tenant
from server.text import text_threads
from server.text.templates import renderer
from tests.server.conftest import StartServer
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, FakeEngineProcess
from tests.support.processes import template_processes
from tests.support.serving import RunningServer, check_error, make_test_context, running_server, wait_until

PROBES = ("/health", "/healthz", "/readyz")


def statuses(server: RunningServer) -> tuple[int, ...]:
    """Return the status codes of PROBES."""
    result = []
    for path in PROBES:
        response = httpx.get(server.url + path)
        if response.status_code != 200:
            error = check_error(response, 503)
            assert error["type"] == "service_unavailable_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
        result.append(response.status_code)
    return tuple(result)


@pytest.fixture
def loading(address: str, model_folder: Path) -> Iterator[RunningServer]:
    context = make_test_context(address, model_folder)
    engine = FakeEngine(FakeEngineConfig(address=address, load_seconds=0.5))
    with engine, running_server(context, engine, wait_ready=False) as server:
        yield server


def test_ready(server: RunningServer) -> None:
    assert statuses(server) == (200, 200, 200)
    for path in PROBES:
        assert httpx.head(server.url + path).status_code == 200


@pytest.mark.checklist("G05")
def test_probes_are_fast(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        for path in PROBES:
            assert min(seconds(client, path) for _ in range(5)) < 0.1


def seconds(client: httpx.Client, path: str) -> float:
    start = time.perf_counter()
    client.get(path)
    return time.perf_counter() - start


@pytest.mark.checklist("G04")
def test_loading(loading: RunningServer) -> None:
    assert statuses(loading) == (503, 200, 503)
    check_error(httpx.post(loading.url + "/v1/completions", json={"model": "tiny", "prompt": "x"}), 503)
    check_error(httpx.get(loading.url + "/v1/models"), 503)
    assert "num_requests_running" in httpx.get(loading.url + "/metrics").text
    wait_until(lambda: statuses(loading) == (200, 200, 200))


def test_draining(server: RunningServer) -> None:
    server.model.client.drain()
    assert statuses(server) == (200, 200, 503)
    response = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "x"})
    check_error(response, 503)
    assert response.headers["connection"] == "close"


@pytest.mark.checklist("G05")
def test_hanging(fake_engine: FakeEngine, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine_client.liveness.MISSED_HEARTBEATS", 0.5)
    context = make_test_context(fake_engine.config.address, model_folder, step_timeout=0.7)
    with running_server(context, fake_engine) as server:
        assert statuses(server) == (200, 200, 200)
        fake_engine.hang()
        wait_until(lambda: statuses(server) == (503, 503, 503))


@pytest.mark.checklist("G05")
def test_work_on_texts_that_hangs(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readiness comes back by itself, when the process that renders chats has been replaced."""
    monkeypatch.setattr(text_threads, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(renderer, "MAX_WAITING_SECONDS", 3.0)
    server = start_server()
    for process in template_processes():
        process.suspend()
    with ThreadPoolExecutor(1) as pool:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
        answer = pool.submit(httpx.post, server.url + "/v1/chat/completions", json=chat, timeout=30)
        wait_until(lambda: statuses(server) == (503, 200, 503))
        assert answer.result().status_code == 200
    assert statuses(server) == (200, 200, 200)


@pytest.mark.checklist("G05")
def test_dead(address: str, model_folder: Path) -> None:
    context = make_test_context(address, model_folder)
    with FakeEngineProcess(FakeEngineConfig(address=address)) as engine, running_server(context) as server:
        assert statuses(server) == (200, 200, 200)
        os.kill(engine.pid, signal.SIGKILL)
        wait_until(lambda: statuses(server) == (503, 503, 503), timeout=1.0)
        response = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "x"})
        check_error(response, 503)


@pytest.mark.checklist("E16")
def test_probes_answer_under_load(server: RunningServer, fake_engine: FakeEngine) -> None:
    """Probes are answered while the queue is full."""
    fake_engine.pause()
    client = server.model.client
    reservation = client.reserve(client.max_in_flight, tenant=Tenant(name="127.0.0.1"))
    try:
        check_error(httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "x"}), 429)
        assert statuses(server) == (200, 200, 200)
    finally:
        reservation.release()
