"""Models are loaded when they are needed, and unloaded when they are idle or another one needs their memory."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine_client.supervisor_channel import StartEngine, StopEngine
from server.models import manager as manager_module
from server.models import memory
from server.models.memory import Room
from tests.support.serving import check_error, wait_until
from tests.support.several_models import SeveralModels, several_models


@pytest.fixture
def two(model_folder: Path) -> Iterator[SeveralModels]:
    """A server of two models, which are loaded on first use."""
    with several_models(model_folder) as server:
        yield server


def set_room(monkeypatch: pytest.MonkeyPatch, *, needed: int, total: int) -> None:
    """Let each model need `needed` bytes of the `total` that the server may use."""
    monkeypatch.setattr(manager_module, "least_memory", lambda config, files: needed)
    monkeypatch.setattr(manager_module, "memory_taken", lambda info: needed)
    monkeypatch.setattr(memory.HostBudget, "room", lambda self, settings, taken: Room(total, total - taken))


def test_a_model_is_loaded_by_its_first_request(two: SeveralModels) -> None:
    assert two.states == {"one": "unloaded", "two": "unloaded"}
    assert two.supervisor.orders == []
    assert two.complete("two").json()["model"] == "two"
    assert two.states == {"one": "unloaded", "two": "loaded"}
    assert two.complete("two").status_code == 200
    assert [type(order) for order in two.supervisor.orders] == [StartEngine]


def test_requests_that_come_together_load_it_once(two: SeveralModels) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(two.complete, ["one"] * 8)} == {200}
    assert len(two.supervisor.orders) == 1


def test_models_are_loaded_at_the_start_and_the_server_is_ready_then(model_folder: Path) -> None:
    models: tuple[dict[str, Any], ...] = ({"load": "at-start"}, {})
    with several_models(model_folder, models=models, engines={"load_seconds": 0.5}) as server:
        assert httpx.get(server.url + "/readyz").status_code == 503
        assert httpx.get(server.url + "/healthz").status_code == 200
        wait_until(lambda: httpx.get(server.url + "/readyz").status_code == 200)
        assert server.states == {"one": "loaded", "two": "unloaded"}
        assert httpx.get(server.url + "/readyz").json()["models"] == {"loaded": 1, "unloaded": 1}


def test_the_progress_of_a_load_can_be_seen(model_folder: Path) -> None:
    with several_models(model_folder, engines={"load_seconds": 1.0}) as server, ThreadPoolExecutor() as pool:
        for has_been_loaded in (False, True):
            answer = pool.submit(server.complete, "one")
            wait_until(lambda: server.describe("one").get("loading"))
            loading = server.describe("one")["loading"]
            assert loading["seconds"] >= 0
            assert (loading["fraction"] is not None) == has_been_loaded
            assert answer.result().status_code == 200
            assert "loading" not in server.describe("one")
            unload(server, "one")


def unload(server: SeveralModels, name: str) -> None:
    """Unload a model as clients of Ollama do."""
    answer = httpx.post(server.url + "/api/generate", json={"model": name, "keep_alive": 0})
    assert answer.json()["done_reason"] == "unload"
    assert "x-lightwell-warnings" not in answer.headers
    wait_until(lambda: server.states[name] == "unloaded")


def test_a_client_can_unload_a_model(two: SeveralModels) -> None:
    two.complete("one")
    (process,) = two.supervisor.processes.values()
    unload(two, "one")
    assert two.supervisor.processes == {}
    assert process.pid
    assert isinstance(two.supervisor.orders[-1], StopEngine)
    assert two.complete("one").status_code == 200


def test_an_idle_model_is_unloaded_and_a_busy_one_is_not(model_folder: Path) -> None:
    engines = {"endless": True, "step_seconds": 0.02}
    with several_models(model_folder, engines=engines, idle_unload=1.0) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.complete, "one", max_tokens=150)  # for more than three seconds
        server.complete("two")
        wait_until(lambda: server.states["two"] == "unloaded")
        assert not answer.done()
        assert answer.result().status_code == 200
        wait_until(lambda: server.states["one"] == "unloaded")


def test_the_least_recently_used_model_makes_room(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, needed=4, total=10)
    with several_models(model_folder, models=({}, {}, {})) as server:
        for name in ("one", "two", "one", "three"):
            assert server.complete(name).status_code == 200
        assert server.states == {"one": "loaded", "two": "unloaded", "three": "loaded"}


def test_a_model_in_use_is_waited_for(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, needed=6, total=10)
    engines = {"endless": True, "step_seconds": 0.01}
    with several_models(model_folder, engines=engines) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(server.complete, "one", max_tokens=100)
        wait_until(lambda: server.states["one"] == "loaded")
        assert server.complete("two").status_code == 200
        assert first.done()
        assert first.result().status_code == 200
        assert server.states == {"one": "unloaded", "two": "loaded"}


def test_a_request_waits_no_longer_than_it_may(model_folder: Path) -> None:
    with several_models(model_folder, engines={"never_ready": True}) as server:
        started = time.monotonic()
        error = check_error(server.complete("one", queue_timeout=0.5), 503)
        assert time.monotonic() - started >= 0.5
        assert error["message"].startswith("The model `one` is still being loaded.")


def test_a_model_that_can_never_fit_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, needed=5 << 30, total=3 << 30)
    with several_models(model_folder) as server:
        error = check_error(server.complete("one"), 503)
        assert error["code"] == "model_load_failed"
        assert "it needs about 5.4 GB of memory, and the server may use 3.2 GB" in error["message"]
        assert server.describe("one")["state"] == "failed"
        assert "5.4 GB" in server.describe("one")["reason"]
        assert server.supervisor.orders == []


def test_a_model_that_cannot_be_loaded_fails_only_its_own_requests(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% if %}")
    models: tuple[dict[str, Any], ...] = ({"chat_template": str(tmp_path / "bad.jinja")}, {})
    with several_models(model_folder, models=models) as server:
        error = check_error(server.complete("one"), 503)
        assert "bad.jinja" in error["message"]
        assert server.complete("two").status_code == 200
        assert server.states == {"one": "failed", "two": "loaded"}
        assert list(server.supervisor.processes) == [1]
        assert httpx.get(server.url + "/health").json()["models"] == {"failed": 1, "loaded": 1}
        assert len(server.supervisor.orders) == 3
        check_error(server.complete("one"), 503)  # it is not tried again at once
        assert len(server.supervisor.orders) == 3


def test_an_engine_that_is_given_up_is_started_again_later(two: SeveralModels, monkeypatch: pytest.MonkeyPatch) -> None:
    two.complete("one")
    two.complete("two")
    monkeypatch.setattr(manager_module, "RETRY_SECONDS", 0.0)
    manager, loop = two.context.model_manager, two.slots[0].served
    assert manager is not None
    assert loop is not None
    task_loop = loop.client.engines[0]._tasks[0].get_loop()
    two.supervisor.end(0)
    task_loop.call_soon_threadsafe(manager.engine_gone, 0, "its process has ended")
    wait_until(lambda: two.states == {"one": "failed", "two": "loaded"})
    assert two.complete("one").status_code == 200


def test_all_models_failing_is_a_failure_of_the_server(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, needed=2, total=1)
    with several_models(model_folder, models=({"load": "at-start"},)) as server:
        wait_until(lambda: server.states == {"one": "failed"})
        for path in ("/health", "/healthz", "/readyz"):
            check_error(httpx.get(server.url + path), 503)


def test_a_load_ends_with_the_server(model_folder: Path) -> None:
    """Its client gets an error, and nothing is left."""
    results: list[httpx.Response] = []
    with several_models(model_folder, engines={"never_ready": True}) as server:

        def ask() -> None:
            results.append(server.complete("one"))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: server.states["one"] == "loading")
        assert server.context.model_manager is not None
        asking: Any = server.context.model_manager
        loop = server.slots[0].task
        assert loop is not None
        loop.get_loop().call_soon_threadsafe(asking.drain)
        thread.join(10)
    assert check_error(results[0], 503)["message"] == "The server is shutting down. Please retry later."
