"""LoRA adapters as models, and loading and unloading them at runtime."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.shared.messages import AdapterDone, AdapterField, EngineStats, LoadAdapter, Submit, UnloadAdapter
from server.metrics import Metrics
from server.parts.lora import part as adapters
from server.tenants import Tenant
from tests.server.api.test_contract import ACTING
from tests.server.dialects import COUNT, DETOKENIZE, EMBEDDINGS, INPUT_TOKENS, LOAD, TOKENIZE, UNLOAD
from tests.server.kinds import CHESS, SQL
from tests.support import clients
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, RESPONSES
from tests.support.engine_info import ENGINE_INFO
from tests.support.serving import RunningServer, check_error, wait_until

NAMES = ["tiny", "org/tiny", "org/sql", "chess"]
GENERATING = (COMPLETIONS, CHAT, RESPONSES, ANTHROPIC, EMBEDDINGS)
OTHERS = (f"{COMPLETIONS}/render", f"{CHAT}/render", INPUT_TOKENS, COUNT, TOKENIZE, DETOKENIZE)


@contextmanager
def own_server(model_folder: Path, **settings: Any) -> Iterator[RunningServer]:
    """A server with two adapters and room for a third, and other settings than `adapted`."""
    with clients.shared_server(model_folder, settings=settings, adapters=[SQL, CHESS], max_loras=3) as server:
        yield server


def ask(server: RunningServer, path: str, model: str, **fields: Any) -> httpx.Response:
    return clients.ask(server.url, path, **ACTING[path.removesuffix("/render")][1] | {"model": model} | fields)


def load(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(server.url + LOAD, json=body)


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
    return str(clients.write_adapter(tmp_path / "go"))


# Adapters as models.


def test_adapters_have_the_default_sampling_of_their_model(model_folder: Path) -> None:
    with own_server(model_folder, default_sampling={"temperature": 0.5}) as server:
        assert httpx.get(f"{server.url}/v1/models/chess").json()["default_sampling"] == {"temperature": 0.5}
        assert ask(server, COMPLETIONS, "chess").status_code == 200
        submit = server.engine.submits[-1]
        assert (submit.lora_name, submit.params.temperature) == ("chess", 0.5)


def test_the_list_of_models(adapted: RunningServer) -> None:
    models = httpx.get(f"{adapted.url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == NAMES
    assert [model["root"] for model in models] == ["tiny", "tiny", "/adapters/org/sql", "/adapters/chess"]
    assert [model["parent"] for model in models] == [None, None, "tiny", "tiny"]
    assert httpx.get(f"{adapted.url}/v1/models/org/sql").json() == models[2]
    assert models[2] == models[0] | {name: models[2][name] for name in ("id", "root", "parent")}
    for name in ("sql", "org/sql/", ""):
        check_error(httpx.get(f"{adapted.url}/v1/models/{name}"), 404)
    error = check_error(clients.ask(adapted.url, CHAT, model=...), 400)  # which it must name
    assert error["message"] == "you must provide a model parameter"


@pytest.mark.parametrize("path", GENERATING)
def test_the_engine_gets_the_adapter(adapted: RunningServer, path: str) -> None:
    for name, adapter in (("org/sql", SQL), ("org/tiny", None), ("chess", CHESS)):
        num_submits = len(adapted.engine.submits)
        answer = ask(adapted, path, name)
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        expected = ("", "") if adapter is None else (adapter.name, adapter.fingerprint)
        assert used(adapted.engine.submits[num_submits:]) == {expected}
    assert adapted.model.client.num_in_flight == 0


@pytest.mark.parametrize(("path", "fields"), [(COMPLETIONS, {"prompt": ["a", "b"]}), (CHAT, {"n": 2})])
def test_every_prompt_and_the_fingerprint(adapted: RunningServer, path: str, fields: dict[str, Any]) -> None:
    assert ask(adapted, path, "tiny").json()["system_fingerprint"] == "fp_fake"
    expected = f"fp_fake-{SQL.fingerprint[:12]}"
    assert ask(adapted, path, "org/sql").json()["system_fingerprint"] == expected
    num_submits = len(adapted.engine.submits)
    chunks = clients.parse_events(ask(adapted, path, "org/sql", stream=True, **fields).text)
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


# Loading and unloading.


def test_load_and_unload(adapted: RunningServer, path: str) -> None:
    answer = load(adapted, lora_name="go", lora_path=f"{path}/")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'go' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    (loaded,) = changes(adapted)
    assert isinstance(loaded, LoadAdapter)
    assert (loaded.name, loaded.path, loaded.replaces) == ("go", path, False)
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


class Gate:
    """What passes it is held until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def hold(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> Gate:
    """The download of an adapter."""

    def fetch(name: str) -> Path:
        gate.hold()
        return Path("/cache") / name

    monkeypatch.setattr(adapters, "resolve_adapter", fetch)
    return gate


def test_others_are_served_meanwhile(adapted: RunningServer, threads: ThreadPoolExecutor, fetching: Gate) -> None:
    answer = threads.submit(load, adapted, lora_name="go", lora_path="org/go@main")
    assert fetching.reached.wait(60)
    assert ask(adapted, CHAT, "chess").status_code == 200
    check_error(ask(adapted, CHAT, "go"), 404)
    fetching.opened.set()
    assert answer.result().status_code == 200
    assert httpx.get(f"{adapted.url}/v1/models/go").json()["root"] == "/cache/org/go@main"


@pytest.mark.parametrize(
    ("field", "param"), [(AdapterField.NAME, "lora_name"), (AdapterField.PATH, "lora_path"), (None, None)]
)
def test_adapters_the_engine_cannot_load(
    adapted: RunningServer, path: str, field: AdapterField | None, param: str | None
) -> None:
    problem = AdapterDone(request_id="", error="a reason", field=field)
    adapted.engine.config.adapter_error = problem
    error = check_error(load(adapted, lora_name="a", lora_path=path), 400)
    assert (error["message"], error["code"], error["param"]) == ("a reason", param and "invalid_value", param)
    adapted.engine.config.adapter_error = msgspec.structs.replace(problem, is_temporary=True)
    answer = load(adapted, lora_name="a", lora_path=path)
    error = check_error(answer, 503)
    assert (error["message"], error["code"], error["param"]) == ("a reason", "adapters_busy", None)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    adapted.engine.config.adapter_error = None
    assert load(adapted, lora_name="a", lora_path=path).status_code == 200
    assert "3 adapters" in check_error(load(adapted, lora_name="b", lora_path=path), 400)["message"]
    assert model_names(adapted) == [*NAMES, "a"]


def test_adapters_the_engine_has_lost(adapted: RunningServer) -> None:
    """The error is the same as if the server had known it before."""
    del adapted.engine.loaded["chess"]
    error = check_error(unload(adapted, "chess"), 404)
    assert error == check_error(unload(adapted, "chess"), 404)
    assert (error["param"], error["code"]) == ("lora_name", "model_not_found")


def test_unloads(adapted: RunningServer) -> None:
    for name in ("checkers", "tiny"):
        error = check_error(unload(adapted, name), 404)
        assert (error["param"], f"'{name}' cannot be found" in error["message"]) == ("lora_name", True)
    for fields, param in (({"lora_name": 5}, "lora_name"), ({"lora_int_id": "1"}, "lora_int_id")):
        assert check_error(unload(adapted, "chess", **fields), 400)["param"] == param
    assert check_error(httpx.post(adapted.url + UNLOAD, json={}), 400)["param"] == "lora_name"
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


# Concurrent requests.


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch, gate: Gate, adapted: RunningServer) -> Gate:
    """Requests between validation and submit."""
    kind = type(adapted.context.text_threads)
    run = kind.run

    async def run_later(threads: Any, tenant: Tenant, size: int, *work: Any) -> Any:
        await run(threads, tenant, size, gate.hold)
        return await run(threads, tenant, size, *work)

    monkeypatch.setattr(kind, "run", run_later)
    return gate


@pytest.mark.parametrize("what", ["replaced", "unloaded", "forgotten"])
@pytest.mark.parametrize("asked", GENERATING)
def test_changed_between_validation_and_submit(
    adapted: RunningServer, validated: Gate, threads: ThreadPoolExecutor, path: str, asked: str, what: str
) -> None:
    """The request uses the adapter that was loaded when it was validated; it fails if the engine has it no more."""
    adapted.engine.config.forgets_adapters = what == "forgotten"
    pending = threads.submit(ask, adapted, asked, "chess")
    assert validated.reached.wait(60)
    if what == "replaced":
        assert load(adapted, lora_name="chess", lora_path=path, load_inplace=True).status_code == 200
    else:
        assert unload(adapted, "chess").status_code == 200
    validated.opened.set()
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

    paths = [str(clients.write_adapter(tmp_path / name)) for name in ("one", "two")]
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


# Shutdown.


def check_shutting_down(answer: httpx.Response) -> None:
    assert "shutting down" in check_error(answer, 503)["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["connection"] == "close"


def test_shutdown_ends_the_wait(model_folder: Path, path: str, threads: ThreadPoolExecutor, fetching: Gate) -> None:
    with own_server(model_folder, allow_runtime_lora_updating=True) as server:
        server.engine.config.ignores_adapters = True
        fetched = threads.submit(load, server, lora_name="go", lora_path="org/go")
        assert fetching.reached.wait(60)
        unloaded = threads.submit(unload, server, "chess")
        wait_until(lambda: len(changes(server)) == 1)
        server.loop.call_soon_threadsafe(server.model.client.drain)
        for answer in (fetched, unloaded):
            check_shutting_down(answer.result())
        check_shutting_down(load(server, lora_name="go", lora_path=path))
        check_shutting_down(unload(server, "org/sql"))
        fetching.opened.set()
        assert len(changes(server)) == 1


@pytest.mark.parametrize("max_loras", [0, 3])
def test_adapters_in_use(max_loras: int) -> None:
    """Sorted names, for the latest statistics of all engines only, and only if LoRA is enabled."""
    metrics, start = Metrics("vllm:", "m"), int(time.time())
    stats = [EngineStats(running_adapters=["b", "a"], waiting_adapters=["c"]), EngineStats(running_adapters=["d"])]
    for number, each in enumerate(stats):
        engine = metrics.add_engine(number, lambda each=each: each)  # type: ignore[misc]
        engine.set_info(msgspec.structs.replace(ENGINE_INFO, max_loras=max_loras))

    def labels() -> list[dict[str, str]]:
        families = list(adapters.AdapterCollector(metrics).collect())
        assert all((family.name, family.type) == ("vllm:lora_requests_info", "gauge") for family in families)
        samples = [sample for family in families for sample in family.samples]
        assert all(start <= sample.value <= time.time() for sample in samples)
        return [sample.labels for sample in samples]

    first = {"max_lora": "3", "running_lora_adapters": "a,b,d", "waiting_lora_adapters": "c"}
    assert labels() == ([first] if max_loras else [])
    stats[0].running_adapters, stats[0].waiting_adapters = ["c"], []
    second = {"max_lora": "3", "running_lora_adapters": "c,d", "waiting_lora_adapters": ""}
    assert labels() == ([second] if max_loras else [])
