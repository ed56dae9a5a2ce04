"""Health endpoints in each state of the engine and of the server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.text import text_threads
from tests.support.clients import CHAT, COMPLETIONS, ask
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.processes import template_processes
from tests.support.serving import (
    RunningServer,
    check_error,
    fresh_server,
    make_test_context,
    running_server,
    wait_until,
)

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


@pytest.mark.checklist("G05")
def test_ready(server: RunningServer) -> None:
    """Whatever else the event loop has to do, which is tested where it is done: none of it waits in these routes."""
    assert statuses(server) == (200, 200, 200)
    assert [httpx.head(server.url + path).status_code for path in PROBES] == [200] * 3


@pytest.mark.checklist("G04")
def test_loading(address: str, model_folder: Path) -> None:
    config = FakeEngineConfig(address=address, never_ready=True)
    context = make_test_context(address, model_folder)
    with FakeEngine(config) as engine, running_server(context, engine, wait_ready=False) as server:
        assert statuses(server) == (503, 200, 503)
        check_error(ask(server.url, COMPLETIONS), 503)
        check_error(httpx.get(server.url + "/v1/models"), 503)
        assert "num_requests_running" in httpx.get(server.url + "/metrics").text
        config.never_ready = False
        wait_until(lambda: statuses(server) == (200, 200, 200))


def test_draining(model_folder: Path) -> None:
    with fresh_server(model_folder) as server:
        server.model.client.drain()
        assert statuses(server) == (200, 200, 503)
        response = ask(server.url, COMPLETIONS)
        check_error(response, 503)
        assert response.headers["connection"] == "close"


@pytest.mark.checklist("G05")
def test_hanging_and_dead(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/server/engine_client tests how the server notices it."""
    with fresh_server(model_folder) as server:
        liveness = server.model.client.engines[0].liveness
        monkeypatch.setattr(liveness, "_is_silent", lambda: True)
        assert statuses(server) == (503, 503, 503)
        wait_until(lambda: liveness.dead_reason)
        assert statuses(server) == (503, 503, 503)
        check_error(ask(server.url, COMPLETIONS), 503)


@pytest.mark.checklist("G05")
def test_work_on_texts_that_hangs(model_folder: Path) -> None:
    """Readiness comes back by itself, when there is progress again."""
    others = template_processes()
    with fresh_server(model_folder) as server, ThreadPoolExecutor(1) as pool:
        processes = [process for process in template_processes() if process not in others]
        for process in processes:
            process.suspend()
        answer = pool.submit(ask, server.url, CHAT)
        wait_until(lambda: server.context.text_threads._short_work)
        assert statuses(server) == (200, 200, 200)
        server.turn(text_threads.STUCK_SECONDS + 1)
        assert statuses(server) == (503, 200, 503)
        for process in processes:
            process.resume()
        assert answer.result().status_code == 200
        assert statuses(server) == (200, 200, 200)
