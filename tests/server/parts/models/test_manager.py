"""Several models: they are loaded when they are needed, unloaded when they are idle or another one needs their memory,
and a request reaches the one that it names, each with its own engine, tokenizer and adapters."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.models.served_model import ServedModel
from server.parts.models import manager as manager_module
from server.parts.models.manager import IDLE_POLL_SECONDS, LOAD_TIMEOUT, Room
from server.parts.models.waiting import RETRY_SECONDS
from server.processes.supervisor_channel import StartEngine, StopEngine
from tests.support.clients import MINIMAL
from tests.support.fake_engine import make_adapter
from tests.support.records import example_step
from tests.support.serving import check_error, wait_until
from tests.support.several_models import NAMES, SeveralModels, several_models, unload


@pytest.fixture
def two(model_folder: Path) -> Iterator[SeveralModels]:
    """A server of two models, which are loaded on first use."""
    with several_models(model_folder) as server:
        yield server


def set_room(monkeypatch: pytest.MonkeyPatch, *, needed: int, total: int) -> None:
    """Let each model need `needed` bytes of the `total` that the server may use."""
    monkeypatch.setattr(manager_module, "least_memory", lambda *_: needed)
    monkeypatch.setattr(manager_module, "memory_taken", lambda info: needed)
    monkeypatch.setattr(manager_module.HostBudget, "room", lambda self, settings, taken: Room(total, total - taken))


@contextmanager
def running(server: SeveralModels, name: str, pool: ThreadPoolExecutor) -> Iterator[Future[httpx.Response]]:
    """Let a request wait in the engine until the end of the context."""
    server.complete(name)
    engine = server.supervisor.engines[NAMES.index(name)]
    engine.pause()
    answer = pool.submit(server.complete, name)
    wait_until(lambda: engine.num_choices == 1)
    yield answer
    assert not answer.done()
    engine.resume()
    assert answer.result().status_code == 200


def test_a_model_is_loaded_by_its_first_request(two: SeveralModels) -> None:
    assert two.states == {"one": "unloaded", "two": "unloaded"}
    assert two.supervisor.orders == []
    assert two.complete("two").json()["model"] == "two"
    assert two.states == {"one": "unloaded", "two": "loaded"}
    assert two.complete("two").status_code == 200
    assert [type(order) for order in two.supervisor.orders] == [StartEngine]
    unload(two, "two")
    assert two.supervisor.engines == {}
    assert isinstance(two.supervisor.orders[-1], StopEngine)
    assert two.complete("two").status_code == 200


def test_a_request_for_the_tokenizer_loads_the_model(two: SeveralModels) -> None:
    get = partial(httpx.get, two.url + "/tokenizer_info")
    check_error(get(), 400)
    assert check_error(get(params={"model": "no"}), 404)["code"] == "model_not_found"
    assert get(params={"model": "two"}).json()["vocab_size"] > 0
    assert two.states == {"one": "unloaded", "two": "loaded"}


def test_the_records_of_a_model_that_is_not_loaded(two: SeveralModels) -> None:
    error = check_error(httpx.get(two.url + "/lightwell/v1/requests", params={"model": "two"}), 503)
    assert error["message"] == "The model `two` is not loaded. A request that runs it loads it."
    assert two.states == {"one": "unloaded", "two": "unloaded"}


def test_requests_that_come_together_load_it_once(two: SeveralModels) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(two.complete, ["one"] * 8)} == {200}
    assert len(two.supervisor.orders) == 1


def test_models_are_loaded_at_the_start_and_the_server_is_ready_then(model_folder: Path) -> None:
    models: tuple[dict[str, Any], ...] = ({"load": "at-start"}, {})
    with several_models(model_folder, models=models, engines={"never_ready": True}) as server:
        assert httpx.get(server.url + "/readyz").status_code == 503
        assert httpx.get(server.url + "/healthz").status_code == 200
        server.supervisor.configs[0].never_ready = False
        wait_until(lambda: httpx.get(server.url + "/readyz").status_code == 200)
        assert server.states == {"one": "loaded", "two": "unloaded"}
        assert httpx.get(server.url + "/readyz").json()["models"] == {"loaded": 1, "unloaded": 1}


def test_the_progress_of_a_load_can_be_seen(model_folder: Path) -> None:
    """By the time that the last one took."""
    with several_models(model_folder, engines={"never_ready": True}) as server, ThreadPoolExecutor() as pool:
        for part in (None, 0.5):
            server.supervisor.configs[0].never_ready = True
            answer = pool.submit(server.complete, "one")
            wait_until(lambda: server.supervisor.engines)
            server.turn(50)
            loading = server.describe("one")["loading"]
            assert 50 <= loading["seconds"] < 100
            assert loading["fraction"] is part is None or 0.4 < loading["fraction"] <= 0.99
            server.turn(50)
            server.supervisor.configs[0].never_ready = False
            assert answer.result().status_code == 200
            assert "loading" not in server.describe("one")
            unload(server, "one")


def test_an_idle_model_is_unloaded_and_a_busy_one_is_not(model_folder: Path) -> None:
    with several_models(model_folder, idle_unload=600.0) as server, ThreadPoolExecutor() as pool:
        with running(server, "one", pool):
            server.complete("two")
            server.turn(599)
            server.turn(0.5)
            assert server.states == {"one": "loaded", "two": "loaded"}
            server.turn(1)
            wait_until(lambda: server.states["two"] == "unloaded")
            assert server.states["one"] == "loaded"
        server.turn(599)
        assert server.states["one"] == "loaded"
        server.turn(2)
        wait_until(lambda: server.states["one"] == "unloaded")


def test_the_least_recently_used_model_makes_room(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, needed=4, total=10)
    with several_models(model_folder, models=({}, {}, {})) as server:
        for name in ("one", "two", "one", "three"):
            assert server.complete(name).status_code == 200
        assert server.states == {"one": "loaded", "two": "unloaded", "three": "loaded"}


def test_a_model_in_use_is_waited_for(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load for which nobody waits any longer is no failure."""
    set_room(monkeypatch, needed=6, total=10)
    with several_models(model_folder) as server, ThreadPoolExecutor() as pool:
        with running(server, "one", pool) as first:
            hasty = pool.submit(server.complete, "two", queue_timeout=20)
            wait_until(lambda: server.states["two"] == "loading")
            server.turn(19)
            assert server.slots[1].num_users == 1
            server.turn(1)
            error = check_error(hasty.result(), 503)
            assert error["code"] == "request_timeout"
            assert error["message"].startswith("The model `two` is still being loaded.")
            server.turn(1)
            wait_until(lambda: server.states["two"] == "unloaded")
            second = pool.submit(server.complete, "two")
            wait_until(lambda: server.states["two"] == "loading")
            server.turn(60)
            assert server.states == {"one": "loaded", "two": "loading"}
        assert second.result().status_code == 200
        assert first.done()
        assert server.states == {"one": "unloaded", "two": "loaded"}


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
        assert "bad.jinja" in check_error(server.complete("one"), 503)["message"]
        assert server.complete("two").status_code == 200
        assert server.states == {"one": "failed", "two": "loaded"}
        assert list(server.supervisor.engines) == [1]
        assert httpx.get(server.url + "/health").json()["models"] == {"failed": 1, "loaded": 1}
        assert len(server.supervisor.orders) == 3
        check_error(server.complete("one"), 503)  # it is not tried again at once
        assert len(server.supervisor.orders) == 3


def test_an_engine_that_is_given_up_is_started_again_later(two: SeveralModels) -> None:
    two.complete("one")
    two.complete("two")
    two.supervisor.end(0)
    two.call(two.manager.engine_gone, 0, "its process has ended")
    wait_until(lambda: two.states == {"one": "failed", "two": "loaded"})
    check_error(two.complete("one"), 503)
    two.turn(RETRY_SECONDS)
    assert two.complete("one").status_code == 200


def test_all_models_failing_is_a_failure_of_the_server(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, needed=2, total=1)
    with several_models(model_folder, models=({"load": "at-start"},)) as server:
        wait_until(lambda: server.states == {"one": "failed"})
        for path in ("/health", "/readyz"):
            check_error(httpx.get(server.url + path), 503)
        assert httpx.get(server.url + "/healthz").status_code == 200  # it need not be killed
        server.turn(RETRY_SECONDS)
        for path in ("/health", "/healthz", "/readyz"):  # the next request tries again
            assert httpx.get(server.url + path).json()["models"] == {"failed": 1}


def mark_dead(server: SeveralModels, number: int) -> None:
    """Let the client of a loaded model give up its engine, which goes on."""
    served = server.slots[number].served
    assert served is not None
    server.call(served.client.engines[0].liveness.mark_dead, "it was restarted with other properties")


def test_an_engine_that_its_client_gives_up_is_stopped(two: SeveralModels) -> None:
    two.complete("one")
    mark_dead(two, 0)
    two.turn(IDLE_POLL_SECONDS)
    wait_until(lambda: two.supervisor.engines == {})
    wait_until(lambda: two.slots[0].task is None)
    assert two.describe("one")["reason"] == "it was restarted with other properties"
    two.turn(RETRY_SECONDS)
    assert two.complete("one").status_code == 200


def test_a_dead_model_is_not_in_memory(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "IDLE_POLL_SECONDS", 60.0)  # so that nobody notices
    with several_models(model_folder) as server:
        for number, name in enumerate(("one", "two")):
            server.complete(name)
            loaded = httpx.get(server.url + "/api/ps").json()["models"]
            assert [model["model"] for model in loaded] == [f"{name}:latest"]
            mark_dead(server, number)


def test_a_model_may_stay_for_longer_than_there_are_dates(two: SeveralModels) -> None:
    body: dict[str, Any] = {"model": "one", "prompt": "Hi", "raw": True, "stream": False}
    for keep_alive in ("999999999h", 1e300):
        answer = httpx.post(two.url + "/api/generate", json=body | {"keep_alive": keep_alive})
        assert answer.status_code == 200, answer.text
        (model,) = httpx.get(two.url + "/api/ps").json()["models"]
        assert datetime.fromisoformat(model["expires_at"]).year > 2300


def test_nothing_is_left_of_a_load_that_fails(model_folder: Path) -> None:
    with several_models(model_folder, engines={"never_ready": True}) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.complete, "one")
        metric = 'num_requests_running{engine="0",model_name="one"}'
        wait_until(lambda: metric in httpx.get(server.url + "/metrics").text)
        server.supervisor.end(0)
        server.call(server.manager.engine_gone, 0, "its process has ended")
        assert check_error(answer.result(), 503)["code"] == "model_load_failed"
        assert metric not in httpx.get(server.url + "/metrics").text


@pytest.mark.parametrize("starts_nothing", [False, True])
def test_a_load_that_hangs_ends(model_folder: Path, starts_nothing: bool) -> None:
    with several_models(model_folder, engines={"never_ready": True}) as server, ThreadPoolExecutor() as pool:
        server.supervisor.starts_nothing = starts_nothing
        answer = pool.submit(server.complete, "one")
        wait_until(lambda: server.supervisor.orders)
        server.turn(LOAD_TIMEOUT - 1)
        assert server.states["one"] == "loading"
        server.turn(1)
        error = check_error(answer.result(), 503)
        assert error["message"] == "The model `one` cannot be loaded: it was not ready within 1800 seconds."
        assert server.supervisor.engines == {}
        assert [type(order) for order in server.supervisor.orders] == [StartEngine, StopEngine]
        server.supervisor.starts_nothing = False
        server.supervisor.configs[1].never_ready = False
        assert server.complete("two").status_code == 200


def test_files_that_cannot_be_read_in_time(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        begun.set()
        release.wait()

    monkeypatch.setattr(manager_module, "least_memory", hang)
    with several_models(model_folder) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.complete, "one")
        begun.wait()
        server.turn(LOAD_TIMEOUT)
        message = check_error(answer.result(), 503)["message"]
        assert message == "The model `one` cannot be loaded: it was not ready within 1800 seconds."
        release.set()


def test_an_engine_is_stopped_if_its_client_cannot_be_closed(
    two: SeveralModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = ServedModel.close

    async def fail(served: ServedModel) -> None:
        await close(served)
        raise RuntimeError("cannot be closed")

    two.complete("one")
    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "close", fail)
        unload(two, "one")
        wait_until(lambda: two.slots[0].task is None)
    assert two.supervisor.engines == {}
    assert two.complete("one").status_code == 200


def test_models_that_do_not_fit_do_not_wait_for_each_other(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Event()
    monkeypatch.setattr(manager_module, "least_memory", lambda *_: both.wait() * 6)
    monkeypatch.setattr(manager_module.HostBudget, "room", lambda self, settings, taken: Room(10, 5))
    with several_models(model_folder) as server, ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.complete, name) for name in ("one", "two")]
        wait_until(lambda: server.states == {"one": "loading", "two": "loading"})
        both.set()
        for answer in answers:
            assert check_error(answer.result(), 503)["code"] == "model_load_failed"


@pytest.mark.parametrize("starts", [False, True])
def test_a_load_ends_with_the_server(model_folder: Path, starts: bool) -> None:
    """Its client gets an error, and nothing is left, even if the engine starts in this moment."""
    with several_models(model_folder, engines={"never_ready": True}) as server, ThreadPoolExecutor() as pool:
        server.supervisor.starts_nothing = starts
        answer = pool.submit(server.complete, "one")
        wait_until(lambda: server.supervisor.orders)

        def shut_down() -> None:
            server.manager.drain()
            if starts:
                server.manager.engine_started(0, os.getpid())  # which was under way

        server.call(shut_down)
        assert check_error(answer.result(), 503)["message"] == "The server is shutting down. Please retry later."


# Each request reaches the model that it names.


GENERATING = MINIMAL | {"/v1/embeddings": {"input": "Hi"}, "/v1/rerank": {"query": "Hi", "documents": ["a"]}}


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Iterator[SeveralModels]:
    """A server of the models `one` and `two`, which are loaded; `two` has the adapter `dialect`."""
    with several_models(model_folder, engines={"max_loras": 1}) as server:
        server.supervisor.configs[1].adapters = [make_adapter("dialect")]
        for name in NAMES[:2]:
            assert server.complete(name).status_code == 200
        yield server


def test_a_request_reaches_the_engine_of_its_model(loaded: SeveralModels) -> None:
    for (path, body), (name, number) in product(GENERATING.items(), (("one", 0), ("two", 1), ("dialect", 1))):
        engine, other = loaded.supervisor.engines[number], loaded.supervisor.engines[1 - number]
        num_other = len(other.submits)
        answer = httpx.post(loaded.url + path, json=body | {"model": name})
        assert answer.status_code == 200, answer.text
        assert engine.submits[-1].lora_name == ("dialect" if name == "dialect" else "")
        assert len(other.submits) == num_other
        if path != "/v1/rerank":
            assert answer.json()["model"] == name


def test_all_models_are_listed(loaded: SeveralModels) -> None:
    models = httpx.get(loaded.url + "/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("one", None), ("two", None), ("dialect", "two")]
    tags = httpx.get(loaded.url + "/api/tags").json()["models"]
    assert [model["name"] for model in tags] == ["one:latest", "two:latest", "dialect:latest"]


def test_a_request_must_name_its_model_if_there_are_several(loaded: SeveralModels) -> None:
    error = check_error(loaded.complete("three"), 404)
    assert error["message"].endswith("Available models: `one`, `two`, `dialect`.")
    assert "model" in check_error(httpx.post(loaded.url + "/v1/completions", json={"prompt": "Hi"}), 400)["message"]


def test_what_the_engine_does_is_that_of_the_chosen_model(loaded: SeveralModels) -> None:
    loaded.supervisor.configs[1].steps = [example_step(7)]
    url = loaded.url + "/lightwell/v1/steps"
    assert httpx.get(url).json()["data"] == httpx.get(url, params={"model": "one"}).json()["data"] == []
    for name in ("two", "dialect"):
        (step,) = httpx.get(url, params={"model": name}).json()["data"]
        assert step["id"] == 7
    check_error(httpx.get(url, params={"model": "three"}), 404)
