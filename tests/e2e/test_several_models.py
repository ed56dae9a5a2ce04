"""One server of several models, each with its own engine process."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

from engine.shared.host_memory import available_memory
from tests.support.server_process import ServerProcess, running_server, shared_server
from tests.support.serving import check_error, wait_until

SMALL = {"max-model-len": 1024, "kv-cache-memory": "64MiB"}
LOAD_SECONDS = 180.0  # bounds hangs only


def config_file(folder: Path, models: list[dict[str, Any]], **settings: Any) -> str:
    file = folder / "models.yaml"
    file.write_text(yaml.safe_dump({**settings, "models": models}))
    return f"--config={file}"


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The models `first`, loaded at the start, `second`, the same on first use, and `broken`, an invalid file."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    models: list[dict[str, Any]] = [
        {"model": str(smollm2_path), "served-model-name": ["first", "gpt-4o"], **SMALL},
        {"model": str(smollm2_path), "served-model-name": "second", "load": "on-first-use", **SMALL},
        {"model": str(folder / "broken.gguf"), "served-model-name": "broken", "load": "on-first-use"},
    ]
    with shared_server(None, config_file(folder, models)) as server:
        yield server


def states(server: ServerProcess) -> dict[str, str]:
    return {model["id"]: model["state"] for model in server.get("/v1/models").json()["data"]}


def engines(server: ServerProcess) -> set[int]:
    """Return the process ids of the engines."""
    found = set()
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found |= {child.pid} if "engine.process" in child.cmdline() else set()
    return found


def unload(server: ServerProcess, name: str) -> None:
    answer = server.http.post("/api/generate", json={"model": name, "keep_alive": 0})
    assert answer.json()["done_reason"] == "unload"
    wait_until(lambda: states(server)[name] == "unloaded", LOAD_SECONDS)


def test_a_model_is_loaded_on_first_use_and_unloaded(server: ServerProcess) -> None:
    assert states(server)["first"] == "loaded"
    assert f"first (loaded), second (unloaded), broken (unloaded), listening on {server.url}" in server.log
    (first_engine,) = engines(server)
    assert states(server)["second"] == "unloaded"
    fields = {"temperature": 0, "max_tokens": 16, "seed": 1}
    texts = set()
    for name in ("first", "second"):
        answer = server.complete(model=name, **fields).json()
        assert answer["model"] == name
        texts.add(answer["choices"][0]["text"])
    assert len(texts) == 1  # of the same weights
    assert states(server)["second"] == "loaded"
    assert len(engines(server)) == 2
    unload(server, "second")
    wait_until(lambda: engines(server) == {first_engine}, LOAD_SECONDS)
    assert server.complete(model="second", **fields).json()["choices"][0]["text"] in texts
    unload(server, "second")


def test_the_openai_client_streams_from_a_model_that_is_loaded_for_it(server: ServerProcess) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert {model.id for model in client.models.list()} == {"first", "gpt-4o", "second", "broken"}
    messages: Any = [{"role": "user", "content": "Hello!"}]
    stream = client.chat.completions.create(model="second", messages=messages, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    unload(server, "second")


def test_a_model_that_cannot_be_loaded_fails_its_own_requests(server: ServerProcess) -> None:
    error = check_error(server.complete(model="broken"), 503)
    assert error["code"] == "model_load_failed"
    broken = server.get("/v1/models/broken").json()
    assert broken["state"] == "failed"
    assert broken["reason"] in error["message"]
    assert server.complete(model="first", max_tokens=2).status_code == 200
    assert server.status("/readyz") == server.status("/healthz") == 200


def test_an_unknown_model_is_refused_with_the_names(server: ServerProcess) -> None:
    message = check_error(server.complete(model="third"), 404)["message"]
    assert message.endswith("Available models: `first`, `gpt-4o`, `second`, `broken`.")


def test_metrics_have_the_name_of_the_model(server: ServerProcess) -> None:
    before = server.metric("lightwell_request_success_total", model_name="first")
    server.complete(model="gpt-4o", max_tokens=2)
    assert server.metric("lightwell_request_success_total", model_name="first") == before + 1
    assert server.metric("lightwell_num_requests_running", model_name="second") == 0
    page = server.get("/metrics").text
    assert page.count("# TYPE lightwell_num_requests_running gauge") == 1
    assert page.count("# TYPE process_resident_memory_bytes gauge") == 1


def test_ollamas_lists_say_what_is_loaded(server: ServerProcess) -> None:
    names = [model["name"] for model in server.get("/api/tags").json()["models"]]
    assert names[:3] == ["first:latest", "gpt-4o:latest", "second:latest"]
    loaded = [model["name"] for model in server.get("/api/ps").json()["models"]]
    assert loaded == ["first:latest", "gpt-4o:latest"]
    shown = server.http.post("/api/show", json={"model": "second"}).json()
    assert shown["details"]["quantization_level"] == "Q4_1"
    assert states(server)["second"] == "unloaded"


def test_the_engine_of_a_model_is_restarted(server: ServerProcess) -> None:
    (engine,) = engines(server)
    psutil.Process(engine).kill()
    wait_until(lambda: engines(server) not in ({engine}, set()), LOAD_SECONDS)
    assert server.complete(model="first", max_tokens=2).status_code == 200
    assert server.get("/health").json()["restarts"] == 1


def test_memory_is_given_to_the_model_that_is_needed(smollm2_path: Path, tmp_path: Path) -> None:
    """Each model asks for a KV cache of more than half of the memory, which is taken only as it is used."""
    more_than_half = int(0.55 * available_memory())
    models = [
        {
            "model": str(smollm2_path),
            "served-model-name": name,
            "load": "on-first-use",
            "max-model-len": 1024,
            "kv-cache-memory": size,
        }
        for name, size in (("a", more_than_half), ("b", more_than_half), ("huge", 4 * more_than_half))
    ]
    with running_server(None, config_file(tmp_path, models, **{"idle-unload": 2})) as server:
        assert states(server) == {"a": "unloaded", "b": "unloaded", "huge": "unloaded"}
        for name, other in (("a", "b"), ("b", "a")):
            assert server.complete(model=name, max_tokens=2).status_code == 200
            assert states(server) | {"huge": "unloaded"} == {name: "loaded", other: "unloaded", "huge": "unloaded"}
        message = check_error(server.complete(model="huge"), 503)["message"]
        assert "it needs about" in message
        assert "the server may use" in message
        wait_until(lambda: states(server) == {"a": "unloaded", "b": "unloaded", "huge": "failed"}, LOAD_SECONDS)
        wait_until(lambda: engines(server) == set(), LOAD_SECONDS)
        assert server.status("/readyz") == 200


def test_a_stream_of_the_messages_api_waits_too(server: ServerProcess) -> None:
    body = {"model": "second", "max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=LOAD_SECONDS) as answer:
        events = [json.loads(line[6:])["type"] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[0] == "message_start"
    assert events[-1] == "message_stop"
    unload(server, "second")
