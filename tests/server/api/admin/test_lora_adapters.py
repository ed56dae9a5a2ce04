"""LoRA adapters as models, and loading and unloading them at runtime."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, Submit, UnloadAdapter
from server.api.admin import lora_adapters as adapters
from server.context import ServerContext
from server.generation import pipeline
from tests.server.api.conftest import CHESS, SQL
from tests.server.api.contract import ANTHROPIC, COUNT, DETOKENIZE, EMBEDDINGS, INPUT_TOKENS, LOAD, RESPONSES, TOKENIZE
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, parse_events, shared_server, write_adapter
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, FakeEngineProcess
from tests.support.serving import RunningServer, check_error, make_test_context, running_server, wait_until
from tests.support.tiny_tokenizer_model import MAX_MODEL_LEN

UNLOAD = "/v1/unload_lora_adapter"
NAMES = ["tiny", "org/tiny", "org/sql", "chess"]
GENERATING: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": MESSAGES},
    RESPONSES: {"input": "Hi"},
    ANTHROPIC: {"messages": MESSAGES, "max_tokens": 9},
    EMBEDDINGS: {"input": ["Hi", "Ho"]},
}
OTHERS: dict[str, dict[str, Any]] = {
    f"{COMPLETIONS}/render": {"prompt": "Hi"},
    f"{CHAT}/render": {"messages": MESSAGES},
    INPUT_TOKENS: {"input": "Hi"},
    COUNT: {"messages": MESSAGES},
    TOKENIZE: {"prompt": "Hi"},
    DETOKENIZE: {"tokens": [72]},
}


@contextmanager
def own_server(model_folder: Path, **settings: Any) -> Iterator[RunningServer]:
    """A server with two adapters and room for a third, and other settings than `adapted`."""
    with shared_server(model_folder, settings=settings, adapters=[SQL, CHESS], max_loras=3) as server:
        yield server


def ask(server: RunningServer, path: str, model: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": model} | (GENERATING | OTHERS)[path] | fields, timeout=60)


def load(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(server.url + LOAD, json=body, timeout=60)


def unload(server: RunningServer, name: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + UNLOAD, json={"lora_name": name} | fields, timeout=60)


def model_names(server: RunningServer) -> list[str]:
    return [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]


def used(submits: list[Submit]) -> set[tuple[str, str]]:
    """Return the names and fingerprints of the adapters of requests."""
    return {(submit.lora_name, submit.lora_fingerprint) for submit in submits}


def changes(server: RunningServer) -> list[LoadAdapter | UnloadAdapter]:
    return [message for message in server.engine.received if isinstance(message, LoadAdapter | UnloadAdapter)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The folder of an adapter."""
    return str(write_adapter(tmp_path / "go"))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


# Adapters as models.


def test_adapters_have_the_default_sampling_of_their_model(model_folder: Path) -> None:
    with own_server(model_folder, default_sampling={"temperature": 0.5}) as server:
        assert httpx.get(f"{server.url}/v1/models/chess").json()["default_sampling"] == {"temperature": 0.5}
        assert ask(server, COMPLETIONS, "chess").status_code == 200
        submit = server.engine.submits[-1]
        assert (submit.lora_name, submit.params.temperature) == ("chess", 0.5)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_must_name_one_of_several_models(adapted: RunningServer, path: str) -> None:
    answer = httpx.post(adapted.url + path, json=GENERATING[path])
    assert check_error(answer, 400)["message"] == "you must provide a model parameter"


def test_the_list_of_models(adapted: RunningServer) -> None:
    models = httpx.get(f"{adapted.url}/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in models] == [
        ("tiny", "tiny", None),
        ("org/tiny", "tiny", None),
        ("org/sql", "/adapters/org/sql", "tiny"),
        ("chess", "/adapters/chess", "tiny"),
    ]
    assert httpx.get(f"{adapted.url}/v1/models/org/sql").json() == models[2]
    assert models[2] == {
        **{"object": "model", "created": adapted.context.created, "owned_by": "lightwell", "state": "loaded"},
        **{"id": "org/sql", "root": "/adapters/org/sql", "parent": "tiny", "max_model_len": MAX_MODEL_LEN},
        **{"default_max_tokens": None, "default_sampling": {}, "default_sampling_sources": {}},
        **{"tool_format": "generic", "reasoning_format": None},
    }
    for name in ("sql", "org/sql/", ""):
        check_error(httpx.get(f"{adapted.url}/v1/models/{name}"), 404)


@pytest.mark.parametrize("path", GENERATING)
def test_the_engine_gets_the_adapter(adapted: RunningServer, path: str) -> None:
    for name, adapter in (("org/sql", SQL), ("org/tiny", None), ("chess", CHESS)):
        num_submits = len(adapted.engine.submits)
        answer = ask(adapted, path, name)
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        expected = ("", "") if adapter is None else (adapter.name, adapter.fingerprint)
        assert used(adapted.engine.submits[num_submits:]) == {expected}
    assert adapted.model.client.num_in_flight == 0
    if path != EMBEDDINGS:
        for field, value in (("lora_path", "chess"), ("lora", [{"id": 0, "scale": 1.0}])):
            message = ask(adapted, path, "tiny", **{field: value}).json()["error"]["message"]
            assert f"'{field}' is not supported" in message
            assert "Use the adapter's name as model." in message


@pytest.mark.parametrize(("path", "fields"), [(COMPLETIONS, {"prompt": ["a", "b"]}), (CHAT, {"n": 2})])
def test_every_prompt_and_the_fingerprint(adapted: RunningServer, path: str, fields: dict[str, Any]) -> None:
    assert ask(adapted, path, "tiny").json()["system_fingerprint"] == "fp_fake"
    expected = f"fp_fake-{SQL.fingerprint[:12]}"
    assert ask(adapted, path, "org/sql").json()["system_fingerprint"] == expected
    num_submits = len(adapted.engine.submits)
    chunks = parse_events(ask(adapted, path, "org/sql", stream=True, **fields).text)
    assert {(chunk["model"], chunk["system_fingerprint"]) for chunk in chunks} == {("org/sql", expected)}
    assert used(adapted.engine.submits[num_submits:]) == {(SQL.name, SQL.fingerprint)}


@pytest.mark.parametrize("path", OTHERS)
def test_endpoints_that_do_not_use_the_engine(adapted: RunningServer, path: str) -> None:
    of_adapter, of_model = ask(adapted, path, "chess"), ask(adapted, path, "tiny")
    assert (of_adapter.status_code, of_model.status_code) == (200, 200), of_adapter.text
    if path.endswith("/render"):
        (rendered,) = of_adapter.json() if path.startswith(COMPLETIONS) else [of_adapter.json()]
        assert rendered["model"] == "chess"
    else:
        assert of_adapter.json() == of_model.json()


def test_while_the_engine_loads(address: str, model_folder: Path) -> None:
    """An adapter that is loaded with the engine gives 503, not 404, until then."""
    with FakeEngine(FakeEngineConfig(address=address, never_ready=True)) as engine:
        settings = {"lora_modules": ("chess=/adapters/chess",), "allow_runtime_lora_updating": True}
        context = make_test_context(address, model_folder, **settings)
        with running_server(context, engine, wait_ready=False) as server:
            check_error(ask(server, CHAT, "chess"), 503)
            check_error(ask(server, CHAT, "tiny"), 503)
            check_error(ask(server, CHAT, "checkers"), 404)
            check_error(load(server, lora_name="a", lora_path="/"), 503)
            check_error(unload(server, "chess"), 503)


# Loading and unloading.


def test_load_and_unload(adapted: RunningServer, path: str) -> None:
    answer = load(adapted, lora_name="go", lora_path=f"{path}/")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'go' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    assert [(m.name, m.path, m.replaces) for m in changes(adapted) if isinstance(m, LoadAdapter)] == [
        ("go", path, False)
    ]
    assert model_names(adapted) == [*NAMES, "go"]
    assert ask(adapted, CHAT, "go").json()["model"] == "go"
    assert adapted.engine.submits[-1].lora_name == "go"
    answer = unload(adapted, "go")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'go' removed successfully.")
    assert model_names(adapted) == NAMES
    check_error(ask(adapted, CHAT, "go"), 404)
    again = load(adapted, lora_name="go", lora_path=path, scale=2)
    assert (again.status_code, again.headers["x-lightwell-warnings"]) == (200, "ignored parameters: scale")


def test_replace_an_adapter(adapted: RunningServer, path: str) -> None:
    before = ask(adapted, CHAT, "chess").json()["system_fingerprint"]
    error = check_error(load(adapted, lora_name="chess", lora_path=path), 400)
    assert error["param"] == "lora_name"
    assert "has already been loaded" in error["message"]
    assert "load_inplace" in error["message"]
    assert load(adapted, lora_name="chess", lora_path=path, load_inplace=True).status_code == 200
    assert adapted.engine.received[-1].replaces  # type: ignore[union-attr]
    assert httpx.get(f"{adapted.url}/v1/models/chess").json()["root"] == path
    assert ask(adapted, CHAT, "chess").json()["system_fingerprint"] != before


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """An event for the beginning of the download of an adapter, and one that lets it end."""
    started, fetched = threading.Event(), threading.Event()

    def fetch(name: str) -> Path:
        started.set()
        assert fetched.wait(60)
        return Path("/cache") / name

    monkeypatch.setattr(adapters, "resolve_adapter", fetch)
    yield started, fetched
    fetched.set()


def test_others_are_served_while_an_adapter_is_fetched(
    adapted: RunningServer, threads: ThreadPoolExecutor, fetching: tuple[threading.Event, threading.Event]
) -> None:
    answer = threads.submit(load, adapted, lora_name="go", lora_path="org/go@main")
    assert fetching[0].wait(60)
    assert ask(adapted, CHAT, "chess").status_code == 200
    check_error(ask(adapted, CHAT, "go"), 404)
    fetching[1].set()
    assert answer.result().status_code == 200
    assert httpx.get(f"{adapted.url}/v1/models/go").json()["root"] == "/cache/org/go@main"


@pytest.mark.parametrize(
    ("field", "code", "param"),
    [
        (AdapterField.NAME, "invalid_value", "lora_name"),
        (AdapterField.PATH, "invalid_value", "lora_path"),
        (None, None, None),
    ],
)
def test_adapters_the_engine_cannot_load(
    adapted: RunningServer, path: str, field: AdapterField | None, code: str | None, param: str | None
) -> None:
    message = "adapter_config.json: rank 4096 is more than --max-lora-rank 16"
    adapted.engine.config.adapter_error = AdapterDone(request_id="", error=message, field=field)
    answer = load(adapted, lora_name="a", lora_path=path)
    error = check_error(answer, 400)
    assert (error["message"], error["code"], error["param"]) == (message, code, param)
    assert "retry-after" not in answer.headers
    busy = AdapterDone(request_id="", error="all slots are in use", field=field, is_temporary=True)
    adapted.engine.config.adapter_error = busy
    answer = load(adapted, lora_name="a", lora_path=path)
    error = check_error(answer, 503)
    assert (error["type"], error["code"], error["param"]) == ("service_unavailable_error", "adapters_busy", None)
    assert error["message"] == "all slots are in use"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    adapted.engine.config.adapter_error = None
    assert load(adapted, lora_name="a", lora_path=path).status_code == 200
    assert "3 adapters" in check_error(load(adapted, lora_name="b", lora_path=path), 400)["message"]
    assert model_names(adapted) == [*NAMES, "a"]


def test_adapters_the_engine_has_lost(adapted: RunningServer) -> None:
    """The error is the same as if the server had known it before."""
    adapted.engine.forget("chess")
    error = check_error(unload(adapted, "chess"), 404)
    assert error == check_error(unload(adapted, "chess"), 404)
    assert (error["param"], error["code"]) == ("lora_name", "model_not_found")


def test_unloads(adapted: RunningServer) -> None:
    for name in ("checkers", "tiny"):
        error = check_error(unload(adapted, name), 404)
        assert (error["param"], f"'{name}' cannot be found" in error["message"]) == ("lora_name", True)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "lora_name"),
        ({"lora_name": 5}, "lora_name"),
        ({"lora_name": "chess", "lora_int_id": "1"}, "lora_int_id"),
    ]
    for body, param in wrong:
        assert check_error(httpx.post(adapted.url + UNLOAD, json=body), 400)["param"] == param
    assert changes(adapted) == []
    assert unload(adapted, "chess", lora_int_id=7).status_code == 200
    assert adapted.engine.adapters == ["org/sql"]


def test_only_where_it_is_allowed(model_folder: Path, path: str) -> None:
    with own_server(model_folder) as server:
        for answer in (load(server, lora_name="go", lora_path=path), unload(server, "chess")):
            assert "--allow-runtime-lora-updating" in check_error(answer, 404)["message"]
        assert changes(server) == []
    with own_server(model_folder, allow_runtime_lora_updating=True, strict=True) as server:
        assert "scale" in check_error(load(server, lora_name="a", lora_path=path, scale=2), 400)["message"]
    with own_server(model_folder, allow_runtime_lora_updating=True, api_key=("k",)) as server:
        check_error(unload(server, "chess"), 401)
        assert changes(server) == []


# Concurrent requests.


class Pause:
    """Holds requests between validation and submit until it is exited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._stopped, self._go_on = threading.Event(), threading.Event()
        run, tokenize = ServerContext.run_text_work, pipeline._tokenize

        async def run_later(context: Any, request: Any, function: Any, *args: Any) -> Any:
            await run(context, request, self._wait)
            return await run(context, request, function, *args)

        def tokenize_later(job: Any) -> Any:
            self._wait()
            return tokenize(job)

        monkeypatch.setattr(ServerContext, "run_text_work", run_later)
        monkeypatch.setattr(pipeline, "_tokenize", tokenize_later)

    def _wait(self) -> None:
        self._stopped.set()
        assert self._go_on.wait(60)

    def __enter__(self) -> None:
        """Wait until a request is held."""
        assert self._stopped.wait(60)

    def __exit__(self, *exc_info: object) -> None:
        self._go_on.set()


@pytest.mark.parametrize("what", ["replaced", "unloaded", "forgotten"])
@pytest.mark.parametrize("asked", GENERATING)
def test_changed_between_validation_and_submit(
    adapted: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    threads: ThreadPoolExecutor,
    path: str,
    asked: str,
    what: str,
) -> None:
    """The request uses the adapter that was loaded when it was validated; it fails if the engine has it no more."""
    adapted.engine.config.forgets_adapters = what == "forgotten"
    pause = Pause(monkeypatch)
    pending = threads.submit(ask, adapted, asked, "chess")
    with pause:
        if what == "replaced":
            assert load(adapted, lora_name="chess", lora_path=path, load_inplace=True).status_code == 200
        else:
            assert unload(adapted, "chess").status_code == 200
    answer = pending.result()
    assert used(adapted.engine.submits) == {("chess", CHESS.fingerprint)}
    if what == "forgotten":
        assert answer.status_code == 500 or answer.json()["status"] == "failed"
    else:
        assert answer.status_code == 200
        if asked in (COMPLETIONS, CHAT):
            assert answer.json()["system_fingerprint"] == f"fp_fake-{CHESS.fingerprint[:12]}"
    assert adapted.model.client.num_in_flight == 0


def test_an_unload_amid_many_texts(adapted: RunningServer, threads: ThreadPoolExecutor) -> None:
    """Unload the adapter while a request for many embeddings submits its inputs in batches."""
    engine, texts = adapted.engine, [f"{number}" for number in range(30)]
    engine.pause()
    answer = threads.submit(ask, adapted, EMBEDDINGS, "chess", input=texts)
    wait_until(lambda: engine.num_choices)
    assert unload(adapted, "chess").status_code == 200
    assert len(engine.submits) < len(texts)
    engine.resume()
    assert len(answer.result().json()["data"]) == len(texts)
    assert {submit.lora_fingerprint for submit in engine.submits} == {CHESS.fingerprint}


def test_replay(model_folder: Path, tmp_path: Path) -> None:
    def replay(server: RunningServer, answer: httpx.Response) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/requests/{answer.json()['id']}/replay")

    paths = [str(write_adapter(tmp_path / name)) for name in ("one", "two")]
    with own_server(model_folder, record_requests=9, allow_runtime_lora_updating=True) as server:
        assert load(server, lora_name="go", lora_path=paths[0]).status_code == 200
        of_go, of_sql, of_model = (ask(server, CHAT, name) for name in ("go", "org/sql", "tiny"))
        assert replay(server, of_go).json()["bit_equal"]
        assert server.engine.submits[-1].lora_name == "go"
        assert unload(server, "go").status_code == 200
        error = check_error(replay(server, of_go), 404)
        assert error["message"] == "The LoRA adapter 'go' of the recorded request is not loaded any more."
        assert load(server, lora_name="go", lora_path=paths[1]).status_code == 200
        check_error(replay(server, of_go), 404)  # another adapter with the same name
        assert load(server, lora_name="go", lora_path=paths[0], load_inplace=True).status_code == 200
        num_submits = len(server.engine.submits)
        assert [replay(server, answer).json()["bit_equal"] for answer in (of_go, of_sql, of_model)] == [True] * 3
        assert [submit.lora_name for submit in server.engine.submits[num_submits:]] == ["go", "org/sql", ""]
        assert server.model.client.num_in_flight == 0


def test_death_of_the_engine_during_a_load(
    address: str, model_folder: Path, path: str, threads: ThreadPoolExecutor
) -> None:
    config = FakeEngineConfig(address=address, max_loras=3, ignores_adapters=True)
    context = make_test_context(address, model_folder, allow_runtime_lora_updating=True)
    with FakeEngineProcess(config) as engine, running_server(context) as server:
        answer = threads.submit(load, server, lora_name="go", lora_path=path)
        wait_until(lambda: server.model.client.engines[0].adapters._changes)
        engine.kill()
        check_error(answer.result(), 503)
        check_error(load(server, lora_name="go", lora_path=path), 503)
        assert "go" not in server.model.client.adapters


# Shutdown.


def check_shutting_down(answer: httpx.Response) -> None:
    assert "shutting down" in check_error(answer, 503)["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["connection"] == "close"


def drain(server: RunningServer) -> None:
    """Shut down, in the event loop's thread."""
    loop = server.model.client.engines[0]._tasks[0].get_loop()
    loop.call_soon_threadsafe(server.model.client.drain)


def test_shutdown_ends_the_wait_for_adapters(
    model_folder: Path, path: str, threads: ThreadPoolExecutor, fetching: tuple[threading.Event, threading.Event]
) -> None:
    with own_server(model_folder, allow_runtime_lora_updating=True) as server:
        server.engine.config.ignores_adapters = True
        fetched = threads.submit(load, server, lora_name="go", lora_path="org/go")
        assert fetching[0].wait(60)
        unloaded = threads.submit(unload, server, "chess")
        wait_until(lambda: len(changes(server)) == 1)
        drain(server)
        for answer in (fetched, unloaded):
            check_shutting_down(answer.result())
        check_shutting_down(load(server, lora_name="go", lora_path=path))
        check_shutting_down(unload(server, "org/sql"))
        fetching[1].set()
        assert len(changes(server)) == 1


# Metrics.


def lora_series(server: RunningServer) -> list[tuple[dict[str, str], float]]:
    families = {family.name: family for family in parse_text(httpx.get(f"{server.url}/metrics").text)}
    family = families.get("lightwell_lora_requests_info")
    assert family is None or family.type == "gauge"
    return [] if family is None else [(sample.labels, sample.value) for sample in family.samples]


def test_metrics(adapted: RunningServer, server: RunningServer, threads: ThreadPoolExecutor) -> None:
    """Metrics have vLLM's labels, and one series in total; none where there can be no adapters."""
    config = adapted.engine.config
    config.endless, config.step_seconds = True, 0.01
    idle = {"max_lora": "3", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    ((labels, value),) = lora_series(adapted)
    assert (labels, value > adapted.context.created - 1) == (idle, True)
    answers = [threads.submit(ask, adapted, CHAT, "chess", max_tokens=2000)]
    wait_until(lambda: lora_series(adapted)[0][0] == idle | {"running_lora_adapters": "chess"})
    adapted.engine.pause()
    answers += [threads.submit(ask, adapted, CHAT, name, max_tokens=1) for name in ("org/sql", "chess", "tiny")]
    busy = idle | {"running_lora_adapters": "chess", "waiting_lora_adapters": "chess,org/sql"}
    wait_until(lambda: [labels for labels, _ in lora_series(adapted)] == [busy])
    config.step_seconds = 0.0
    adapted.engine.resume()
    assert [answer.result().status_code for answer in answers] == [200] * 4
    wait_until(lambda: [labels for labels, _ in lora_series(adapted)] == [idle])
    assert lora_series(server) == []
