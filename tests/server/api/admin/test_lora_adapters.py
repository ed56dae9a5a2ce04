"""LoRA adapters as models, and loading and unloading them at runtime."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, Submit, UnloadAdapter
from server.api.admin import lora_adapters as adapters
from server.context import ServerContext
from server.generation import pipeline
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, openai_client, parse_events, write_adapter
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, FakeEngineProcess, make_adapter
from tests.support.serving import RunningServer, check_error, make_test_context, running_server, wait_until
from tests.support.tiny_tokenizer_model import MAX_MODEL_LEN

RESPONSES, ANTHROPIC, EMBEDDINGS = "/v1/responses", "/v1/messages", "/v1/embeddings"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SQL, CHESS = make_adapter("org/sql"), make_adapter("chess")

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
    f"{RESPONSES}/input_tokens": {"input": "Hi"},
    f"{ANTHROPIC}/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72]},
}
ALL = GENERATING | OTHERS


@pytest.fixture
def fake_engine(address: str) -> Iterator[FakeEngine]:
    """A fake engine with two adapters and room for a third."""
    with FakeEngine(FakeEngineConfig(address=address, adapters=[SQL, CHESS], max_loras=3)) as engine:
        yield engine


@pytest.fixture
def updatable(start_server: StartServer) -> RunningServer:
    return start_server(allow_runtime_lora_updating=True)


def ask(server: RunningServer, path: str, model: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": model} | ALL[path] | fields, timeout=20)


def load(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(server.url + LOAD, json=body)


def unload(server: RunningServer, name: str) -> httpx.Response:
    return httpx.post(server.url + UNLOAD, json={"lora_name": name})


def model_names(server: RunningServer) -> list[str]:
    return [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]


def of_thread(server: RunningServer, call: Callable[[], None]) -> None:
    """Call a function in the server's event loop thread."""
    server.model.client.engines[0]._tasks[0].get_loop().call_soon_threadsafe(call)


def lora_names(submits: list[Submit]) -> set[str]:
    return {submit.lora_name for submit in submits}


# Adapters as models.


def test_adapters_have_the_default_sampling_of_their_model(start_server: StartServer) -> None:
    server = start_server(default_sampling={"temperature": 0.5})
    assert httpx.get(f"{server.url}/v1/models/chess").json()["default_sampling"] == {"temperature": 0.5}
    assert ask(server, "/v1/completions", "chess").status_code == 200
    submit = server.engine.submits[-1]
    assert (submit.lora_name, submit.params.temperature) == ("chess", 0.5)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_must_name_one_of_several_models(server: RunningServer, path: str) -> None:
    answer = httpx.post(server.url + path, json=ALL[path])
    assert check_error(answer, 400)["message"] == "you must provide a model parameter"


def test_the_list_of_models(server: RunningServer) -> None:
    shared = {"object": "model", "created": server.context.created, "owned_by": "lightwell"}
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in models] == [
        ("tiny", "tiny", None),
        ("org/tiny", "tiny", None),
        ("org/sql", "/adapters/org/sql", "tiny"),
        ("chess", "/adapters/chess", "tiny"),
    ]
    assert httpx.get(f"{server.url}/v1/models/org/sql").json() == models[2]
    assert models[2] == shared | {
        "id": "org/sql",
        "root": "/adapters/org/sql",
        "parent": "tiny",
        "state": "loaded",
        "max_model_len": MAX_MODEL_LEN,
        "default_max_tokens": None,
        "default_sampling": {},
        "default_sampling_sources": {},
        "tool_format": "generic",
        "reasoning_format": None,
    }
    for name in ("sql", "org/sql/", ""):
        check_error(httpx.get(f"{server.url}/v1/models/{name}"), 404)


def test_official_clients(server: RunningServer) -> None:
    with openai_client(server.url) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "org/tiny", "org/sql", "chess"]
        assert client.models.retrieve("org/sql").id == "org/sql"
        completion = client.chat.completions.create(model="chess", messages=MESSAGES)
        assert completion.model == "chess"
        assert completion.choices[0].message.content == "Hello, world!"
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="checkers", messages=MESSAGES)
        assert caught.value.code == "model_not_found"
    assert server.engine.submits[-1].lora_name == "chess"
    with anthropic.Anthropic(base_url=server.url, api_key="x") as client:
        listed = client.models.list()
        assert ([model.id for model in listed], listed.last_id) == (["tiny", "org/tiny", "org/sql", "chess"], "chess")
        assert client.models.retrieve("chess").display_name == "chess"
        assert client.messages.create(model="chess", messages=MESSAGES, max_tokens=9).model == "chess"


@pytest.mark.parametrize("path", GENERATING)
def test_the_engine_gets_the_adapter(server: RunningServer, path: str) -> None:
    for name, adapter in (("org/sql", SQL), ("org/tiny", None), ("chess", CHESS)):
        num_submits = len(server.engine.submits)
        answer = ask(server, path, name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        expected = ("", "") if adapter is None else (adapter.name, adapter.fingerprint)
        submits = server.engine.submits[num_submits:]
        assert {(submit.lora_name, submit.lora_fingerprint) for submit in submits} == {expected}
    assert server.model.client.num_in_flight == 0


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_prompt_and_the_fingerprint(server: RunningServer, path: str) -> None:
    assert ask(server, path, "tiny").json()["system_fingerprint"] == "fp_fake"
    expected = f"fp_fake-{SQL.fingerprint[:12]}"
    assert ask(server, path, "org/sql").json()["system_fingerprint"] == expected
    fields = {"prompt": ["a", "b"]} if path == COMPLETIONS else {"n": 2}
    num_submits = len(server.engine.submits)
    chunks = parse_events(ask(server, path, "org/sql", stream=True, **fields).text)
    assert {(chunk["model"], chunk["system_fingerprint"]) for chunk in chunks} == {("org/sql", expected)}
    assert lora_names(server.engine.submits[num_submits:]) == {"org/sql"}


@pytest.mark.parametrize("path", OTHERS)
def test_endpoints_that_do_not_use_the_engine(server: RunningServer, path: str) -> None:
    of_adapter, of_model = ask(server, path, "chess"), ask(server, path, "tiny")
    assert (of_adapter.status_code, of_model.status_code) == (200, 200), of_adapter.text
    if path.endswith("/render"):
        (rendered,) = of_adapter.json() if path.startswith(COMPLETIONS) else [of_adapter.json()]
        assert rendered["model"] == "chess"
    else:
        assert of_adapter.json() == of_model.json()


@pytest.mark.parametrize("path", ALL)
def test_an_unknown_name(server: RunningServer, path: str) -> None:
    answer = ask(server, path, "checkers")
    assert answer.status_code == 404
    assert "`checkers` does not exist" in answer.json()["error"]["message"]


def test_other_ways_to_choose_are_refused(server: RunningServer) -> None:
    for path in (COMPLETIONS, CHAT, RESPONSES, ANTHROPIC, EMBEDDINGS):
        for name, value in (("lora_path", "chess"), ("lora", [{"id": 0, "scale": 1.0}])):
            answer = ask(server, path, "tiny", **{name: value})
            assert answer.status_code == 400
            assert f"'{name}' is not supported" in answer.json()["error"]["message"]
            assert "Use the adapter's name as model." in answer.json()["error"]["message"]


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


def test_load_and_unload(updatable: RunningServer, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "go")
    answer = load(updatable, lora_name="go", lora_path=f"{folder}/")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'go' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    (message,) = [message for message in updatable.engine.received if isinstance(message, LoadAdapter)]
    assert (message.name, message.path, message.replaces) == ("go", str(folder), False)
    assert model_names(updatable)[-1] == "go"
    assert ask(updatable, CHAT, "go").json()["model"] == "go"
    answer = unload(updatable, "go")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'go' removed successfully.")
    assert model_names(updatable) == ["tiny", "org/tiny", "org/sql", "chess"]
    check_error(ask(updatable, CHAT, "go"), 404)
    assert load(updatable, lora_name="go", lora_path=str(folder)).status_code == 200
    assert updatable.engine.submits[-1].lora_name == "go"


def test_replace_an_adapter(updatable: RunningServer, tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "chess"))
    before = ask(updatable, CHAT, "chess").json()["system_fingerprint"]
    error = check_error(load(updatable, lora_name="chess", lora_path=path), 400)
    assert error["param"] == "lora_name"
    assert "has already been loaded" in error["message"]
    assert "load_inplace" in error["message"]
    assert load(updatable, lora_name="chess", lora_path=path, load_inplace=True).status_code == 200
    assert updatable.engine.received[-1].replaces  # type: ignore[union-attr]
    assert httpx.get(f"{updatable.url}/v1/models/chess").json()["root"] == path
    assert ask(updatable, CHAT, "chess").json()["system_fingerprint"] != before


def test_others_are_served_while_an_adapter_is_fetched(
    updatable: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, fetched = threading.Event(), threading.Event()

    def fetch(name: str) -> Path:
        started.set()
        assert fetched.wait(10)
        return Path("/cache") / name

    monkeypatch.setattr(adapters, "resolve_adapter", fetch)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(load, updatable, lora_name="go", lora_path="org/go@main")
        assert started.wait(10)
        assert ask(updatable, CHAT, "chess").status_code == 200
        check_error(ask(updatable, CHAT, "go"), 404)
        fetched.set()
        assert answer.result().status_code == 200
    assert httpx.get(f"{updatable.url}/v1/models/go").json()["root"] == "/cache/org/go@main"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"lora_path": "/"}, "lora_name", "Missing"),
        ({"lora_name": "a"}, "lora_path", "Missing"),
        ({"lora_name": "", "lora_path": "/"}, "lora_name", "lora_name"),
        ({"lora_name": "a,b", "lora_path": "/"}, "lora_name", "lora_name"),
        ({"lora_name": "a" * 129, "lora_path": "/"}, "lora_name", "lora_name"),
        ({"lora_name": 5, "lora_path": "/"}, "lora_name", "expected a string"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path", "lora_path"),
        ({"lora_name": "a", "lora_path": "/", "load_inplace": "yes"}, "load_inplace", "expected a boolean"),
        ({"lora_name": "tiny", "lora_path": "/"}, "lora_name", "'tiny' is the name of a model"),
        ({"lora_name": "org/tiny", "lora_path": "/", "load_inplace": True}, "lora_name", "the name of a model"),
        ({"lora_name": "a", "lora_path": "/nothing/there"}, "lora_path", "neither an existing file or folder"),
        ({"lora_name": "a", "lora_path": "/"}, "lora_path", "no adapter_config.json in the folder"),
        ({"lora_name": "a", "lora_path": "x\0y"}, "lora_path", "neither an existing file or folder"),
        ({"lora_name": "a", "lora_path": "~\0x"}, "lora_path", "neither an existing file or folder"),
        ({"lora_name": "a", "lora_path": "~\0/x"}, "lora_path", "neither an existing file or folder"),
    ],
)
def test_invalid_loads(updatable: RunningServer, body: dict[str, Any], param: str, message: str) -> None:
    error = check_error(load(updatable, **body), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert updatable.engine.adapters == ["org/sql", "chess"]
    assert not [message for message in updatable.engine.received if isinstance(message, LoadAdapter)]


def test_adapters_the_engine_cannot_load(updatable: RunningServer, fake_engine: FakeEngine, tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "a"))
    message = "adapter_config.json: rank 4096 is more than --max-lora-rank 16"
    for field, code, param in (
        (AdapterField.NAME, "invalid_value", "lora_name"),
        (AdapterField.PATH, "invalid_value", "lora_path"),
        (None, None, None),
    ):
        fake_engine.config.adapter_error = AdapterDone(request_id="", error=message, field=field)
        answer = load(updatable, lora_name="a", lora_path=path)
        error = check_error(answer, 400)
        assert (error["message"], error["code"], error["param"]) == (message, code, param)
        assert "retry-after" not in answer.headers
    fake_engine.config.adapter_error = None
    assert load(updatable, lora_name="a", lora_path=path).status_code == 200
    assert "3 adapters" in check_error(load(updatable, lora_name="b", lora_path=path), 400)["message"]
    assert model_names(updatable)[2:] == ["org/sql", "chess", "a"]


@pytest.mark.parametrize("field", [None, AdapterField.NAME, AdapterField.PATH])
def test_what_the_engine_cannot_load_now(
    updatable: RunningServer, fake_engine: FakeEngine, tmp_path: Path, field: AdapterField | None
) -> None:
    path = str(write_adapter(tmp_path / "a"))
    busy = AdapterDone(request_id="", error="all slots are in use", field=field, is_temporary=True)
    fake_engine.config.adapter_error = busy
    answer = load(updatable, lora_name="a", lora_path=path)
    error = check_error(answer, 503)
    assert (error["type"], error["code"], error["param"]) == ("service_unavailable_error", "adapters_busy", None)
    assert error["message"] == "all slots are in use"
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_adapters_the_engine_has_lost(updatable: RunningServer) -> None:
    """The error is the same as if the server had known it before."""
    updatable.engine.forget("chess")
    error = check_error(unload(updatable, "chess"), 404)
    assert error == check_error(unload(updatable, "chess"), 404)
    assert (error["param"], error["code"]) == ("lora_name", "model_not_found")


def test_invalid_unloads(updatable: RunningServer) -> None:
    error = check_error(unload(updatable, "checkers"), 404)
    assert (error["param"], "'checkers' cannot be found" in error["message"]) == ("lora_name", True)
    check_error(unload(updatable, "tiny"), 404)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "lora_name"),
        ({"lora_name": 5}, "lora_name"),
        ({"lora_name": "chess", "lora_int_id": "1"}, "lora_int_id"),
    ]
    for body, param in wrong:
        assert check_error(httpx.post(updatable.url + UNLOAD, json=body), 400)["param"] == param
    assert not [message for message in updatable.engine.received if isinstance(message, UnloadAdapter)]
    right = {"lora_name": "chess", "lora_int_id": 7}
    assert httpx.post(updatable.url + UNLOAD, json=right).status_code == 200
    assert updatable.engine.adapters == ["org/sql"]


def test_unknown_fields(start_server: StartServer, tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "go"))
    server = start_server(allow_runtime_lora_updating=True)
    answer = load(server, lora_name="go", lora_path=path, scale=2)
    assert answer.headers["x-lightwell-warnings"] == "ignored parameters: scale"
    strict = start_server(allow_runtime_lora_updating=True, strict=True)
    assert "scale" in check_error(load(strict, lora_name="a", lora_path=path, scale=2), 400)["message"]


def test_only_where_it_is_allowed(server: RunningServer, tmp_path: Path) -> None:
    for answer in (
        load(server, lora_name="go", lora_path=str(write_adapter(tmp_path / "go"))),
        unload(server, "chess"),
    ):
        assert "--allow-runtime-lora-updating" in check_error(answer, 404)["message"]
    assert server.engine.adapters == ["org/sql", "chess"]


def test_only_with_a_key(start_server: StartServer) -> None:
    server = start_server(allow_runtime_lora_updating=True, api_key=("k",))
    check_error(unload(server, "chess"), 401)
    assert server.engine.adapters == ["org/sql", "chess"]


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
        assert self._go_on.wait(10)

    def __enter__(self) -> None:
        """Wait until a request is held."""
        assert self._stopped.wait(10)

    def __exit__(self, *exc_info: object) -> None:
        self._go_on.set()


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("replaced", [False, True])
def test_changed_between_validation_and_submit(
    updatable: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, replaced: bool
) -> None:
    """The request uses the adapter that was loaded when it was validated."""
    pause = Pause(monkeypatch)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask, updatable, path, "chess")
        with pause:
            if replaced:
                other = str(write_adapter(tmp_path / "chess"))
                assert load(updatable, lora_name="chess", lora_path=other, load_inplace=True).status_code == 200
            else:
                assert unload(updatable, "chess").status_code == 200
        assert answer.result().status_code == 200
    submits = updatable.engine.submits
    assert {(submit.lora_name, submit.lora_fingerprint) for submit in submits} == {("chess", CHESS.fingerprint)}
    if path in (COMPLETIONS, CHAT):
        assert answer.result().json()["system_fingerprint"] == f"fp_fake-{CHESS.fingerprint[:12]}"
    assert updatable.model.client.num_in_flight == 0


@pytest.mark.parametrize("path", GENERATING)
def test_weights_that_are_gone_at_submit(
    updatable: RunningServer, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    fake_engine.config.forgets_adapters = True
    pause = Pause(monkeypatch)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask, updatable, path, "chess")
        with pause:
            assert unload(updatable, "chess").status_code == 200
        assert answer.result().status_code == 500 or answer.result().json()["status"] == "failed"
    assert updatable.model.client.num_in_flight == 0


def test_an_unload_amid_many_texts(updatable: RunningServer, fake_engine: FakeEngine) -> None:
    """Unload the adapter while a request for many embeddings submits its inputs in batches."""
    fake_engine.pause()
    texts = [f"{number}" for number in range(30)]
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask, updatable, EMBEDDINGS, "chess", input=texts)
        wait_until(lambda: fake_engine.num_choices)
        assert unload(updatable, "chess").status_code == 200
        assert len(fake_engine.submits) < len(texts)
        fake_engine.resume()
        assert len(answer.result().json()["data"]) == len(texts)
    assert {submit.lora_fingerprint for submit in fake_engine.submits} == {CHESS.fingerprint}


def test_running_requests_continue(updatable: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask, updatable, CHAT, "chess")
        wait_until(lambda: fake_engine.num_choices)
        assert unload(updatable, "chess").status_code == 200
        fake_engine.resume()
        assert answer.result().json()["choices"][0]["message"]["content"] == "Hello, world!"


def replay(server: RunningServer, answer: httpx.Response) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/requests/{answer.json()['id']}/replay")


def test_replay(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(record_requests=9, allow_runtime_lora_updating=True)
    paths = [str(write_adapter(tmp_path / name)) for name in ("one", "two")]
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


def test_death_of_the_engine_during_a_load(address: str, model_folder: Path, tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "go"))
    config = FakeEngineConfig(address=address, max_loras=3, ignores_adapters=True)
    context = make_test_context(address, model_folder, allow_runtime_lora_updating=True)
    with FakeEngineProcess(config) as engine, running_server(context) as server, ThreadPoolExecutor() as threads:
        answer = threads.submit(load, server, lora_name="go", lora_path=path)
        time.sleep(0.3)
        assert not answer.done()
        engine.kill()
        check_error(answer.result(), 503)
        check_error(load(server, lora_name="go", lora_path=path), 503)
        assert "go" not in server.model.client.adapters


# Shutdown.


def check_shutting_down(answer: httpx.Response) -> None:
    assert "shutting down" in check_error(answer, 503)["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["connection"] == "close"


def test_shutdown_ends_the_wait_for_adapters(updatable: RunningServer, fake_engine: FakeEngine, tmp_path: Path) -> None:
    path = str(write_adapter(tmp_path / "go"))
    fake_engine.config.ignores_adapters = True
    with ThreadPoolExecutor() as threads:
        answers = [
            threads.submit(load, updatable, lora_name="go", lora_path=path),
            threads.submit(unload, updatable, "chess"),
        ]
        changes = (LoadAdapter, UnloadAdapter)
        wait_until(lambda: sum(isinstance(message, changes) for message in fake_engine.received) == 2)
        of_thread(updatable, updatable.model.client.drain)
        for answer in answers:
            check_shutting_down(answer.result(5))
    check_shutting_down(load(updatable, lora_name="go", lora_path=path))
    check_shutting_down(unload(updatable, "org/sql"))
    assert sum(isinstance(message, changes) for message in fake_engine.received) == 2


def test_shutdown_ends_the_wait_for_what_is_fetched(updatable: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    started, fetched = threading.Event(), threading.Event()

    def fetch(name: str) -> Path:
        started.set()
        assert fetched.wait(10)
        return Path(name)

    monkeypatch.setattr(adapters, "resolve_adapter", fetch)
    try:
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(load, updatable, lora_name="go", lora_path="org/go")
            assert started.wait(10)
            of_thread(updatable, updatable.model.client.drain)
            check_shutting_down(answer.result(5))
    finally:
        fetched.set()
    assert not [message for message in updatable.engine.received if isinstance(message, LoadAdapter)]


# Metrics.


def lora_series(server: RunningServer) -> list[tuple[dict[str, str], float]]:
    families = {family.name: family for family in parse_text(httpx.get(f"{server.url}/metrics").text)}
    family = families.get("lightwell_lora_requests_info")
    assert family is None or family.type == "gauge"
    return [] if family is None else [(sample.labels, sample.value) for sample in family.samples]


def test_metrics(start_server: StartServer, fake_engine: FakeEngine) -> None:
    """Metrics have vLLM's labels, and one series in total."""
    fake_engine.config.max_num_seqs = 1
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01
    server = start_server()
    idle = {"max_lora": "3", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    ((labels, value),) = lora_series(server)
    assert labels == idle
    assert abs(value - time.time()) < 5
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(ask, server, CHAT, "chess", max_tokens=200)]
        wait_until(lambda: lora_series(server)[0][0] == idle | {"running_lora_adapters": "chess"})
        answers += [threads.submit(ask, server, CHAT, name, max_tokens=1) for name in ("org/sql", "chess", "tiny")]
        busy = idle | {"running_lora_adapters": "chess", "waiting_lora_adapters": "chess,org/sql"}
        wait_until(lambda: [labels for labels, _ in lora_series(server)] == [busy])
        assert [answer.result().status_code for answer in answers] == [200] * 4
    wait_until(lambda: [labels for labels, _ in lora_series(server)] == [idle])


def test_no_metrics_where_there_can_be_no_adapters(server: RunningServer) -> None:
    assert lora_series(server) == []
