"""Requests wait for their model: streams with comments, so that proxies keep the connection."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import model_route
from server.models import manager as manager_module
from server.models.manager import ModelManager
from server.models.slot import ModelSlot
from tests.support.fake_engine import make_adapter
from tests.support.serving import check_error, wait_until
from tests.support.several_models import SeveralModels, several_models, unload

MESSAGES = [{"role": "user", "content": "Hi"}]
STREAMS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "Hi"}, "data: [DONE]"),
    ("/v1/chat/completions", {"messages": MESSAGES}, "data: [DONE]"),
    ("/v1/responses", {"input": "Hi"}, "event: response.completed"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, "event: message_stop"),
]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams get comments after a short time."""
    monkeypatch.setattr(model_route, "MAX_HELD_SECONDS", 0.2)
    monkeypatch.setattr(model_route, "COMMENT_SECONDS", 0.2)


def stream(server: SeveralModels, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "one", "stream": True, **body}, timeout=60)


@pytest.mark.usefixtures("soon")
def test_a_stream_has_comments_while_its_model_is_loaded(model_folder: Path) -> None:
    with several_models(model_folder, engines={"load_seconds": 1.0}) as server:
        for path, body, end in STREAMS:
            answer = stream(server, path, body)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            comments = [line for line in answer.text.splitlines() if line.startswith(": loading one, ")]
            assert len(comments) >= 2
            assert end in answer.text
            wait_until(lambda: server.slots[0].num_users == 0)
            again = stream(server, path, body)  # as from a model that is loaded
            assert ": loading" not in again.text
            assert end in again.text
            unload(server, "one")


@pytest.mark.usefixtures("soon")
def test_a_stream_ends_with_an_error_if_its_model_cannot_be_loaded(model_folder: Path) -> None:
    with several_models(model_folder, engines={"never_ready": True}, queue_timeout=0.8) as server:
        for path, body, end in STREAMS:
            answer = stream(server, path, body)
            assert answer.status_code == 200
            assert "The model `one` is still being loaded." in answer.text
            assert (end in answer.text) == (end == "data: [DONE]")


INVALID: list[tuple[str, dict[str, Any], str]] = [
    *((path, {**body, "temperature": 99}, "temperature") for path, body, _ in STREAMS),
    ("/v1/completions", {"prompt": "Hi", "min_p": 0.1, "response_format": {"type": "x"}}, "response_format"),
    ("/v1/completions", {"prompt": "Hi", "n": 2, "best_of": 1}, "best_of"),  # each is valid, but not both
    *(("/v1/completions", {"prompt": "Hi", "queue_timeout": value}, "queue_timeout") for value in (-3, 0, True, "3")),
    ("/v1/embeddings", {"input": {}}, "input"),
    ("/v1/rerank", {"query": "a"}, "documents"),
    ("/tokenize", {"prompt": 1}, "prompt"),
    ("/api/generate", {"prompt": "Hi", "options": 1}, "options"),
]


def test_an_invalid_request_loads_nothing(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        for path, body, field in INVALID:
            for is_stream in (False, True):
                answer = httpx.post(server.url + path, json={"model": "one", "stream": is_stream, **body}, timeout=60)
                assert (answer.status_code, field in answer.text) == (400, True), (path, answer.text)
        body = {"lora_name": "dialect", "lora_path": "/adapters/dialect", "base_model_name": "one"}
        check_error(httpx.post(server.url + "/v1/load_lora_adapter", json=body), 404)  # not allowed
        assert server.supervisor.orders == []


def test_a_short_load_leaves_the_status_to_the_answer(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        for path, body, _ in STREAMS:
            assert ": loading" not in stream(server, path, body).text
            assert stream(server, path, {**body, "temperature": 99}).status_code == 400
            unload(server, "one")


NO_NAME: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": "Hi"}),
    ("/detokenize", {"tokens": [72]}),
    ("/v1/responses/input_tokens", {"input": "Hi"}),
]


def test_the_only_model_is_loaded_if_a_request_names_none(model_folder: Path) -> None:
    models: tuple[dict[str, Any], ...] = ({"lora_modules": ("dialect=/adapters/dialect",)},)
    engines = {"adapters": [make_adapter("dialect")], "max_loras": 1}
    with several_models(model_folder, models=models, engines=engines) as server:
        for path, body in NO_NAME:
            answer = httpx.post(server.url + path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            unload(server, "one")


def test_a_request_must_name_one_of_several_models(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        others = [("/v1/embeddings", {"input": "Hi"}), ("/v1/rerank", {"query": "Hi", "documents": ["a"]})]
        for path, body in [*NO_NAME, *others]:
            assert "model" in check_error(httpx.post(server.url + path, json=body), 400)["message"]
        assert server.supervisor.orders == []


def test_a_replayed_request_waits_for_its_model(model_folder: Path) -> None:
    with several_models(model_folder, record_requests=4) as server:
        request_id = server.complete("two").json()["id"]
        unload(server, "two")
        answer = httpx.post(f"{server.url}/v1/requests/{request_id}/replay", timeout=60)
        assert answer.status_code == 200, answer.text
        assert server.states == {"one": "unloaded", "two": "loaded"}


@pytest.mark.parametrize(
    ("body", "status"), [({}, 200), ({"prompt": "Hi", "stream": False, "options": {"temperature": "hot"}}, 400)]
)
def test_a_keep_alive_without_effect_is_not_kept(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], status: int
) -> None:
    polls, idle_limit = [], ModelManager.idle_limit

    def counted(manager: ModelManager, slot: ModelSlot) -> float | None:
        polls.append(slot)
        return idle_limit(manager, slot)

    monkeypatch.setattr(manager_module, "IDLE_POLL_SECONDS", 0.05)
    monkeypatch.setattr(ModelManager, "idle_limit", counted)
    with several_models(model_folder) as server:
        if status != 200:
            server.complete("one")
        answer = httpx.post(server.url + "/api/generate", json={"model": "one", "keep_alive": 0, **body})
        assert answer.status_code == status, answer.text
        server.complete("one")
        num_polls = len(polls)
        wait_until(lambda: len(polls) >= num_polls + 3)
        assert server.states["one"] == "loaded"
        assert len(server.supervisor.orders) == 1  # it has not been unloaded meanwhile


def test_an_inspection_needs_only_its_own_model(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        body = {"model": "two", "prompt": "Hi"}
        answer = httpx.post(server.url + "/lightwell/v1/inspect", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert server.states == {"one": "unloaded", "two": "loaded"}


def test_each_engine_has_its_own_id(model_folder: Path) -> None:
    with several_models(model_folder, in_processes=True) as server:
        ids = []
        for name in ("one", "two", "one"):
            server.complete(name)
            ids.append(httpx.get(server.url + "/lightwell/v1/engine", params={"model": name}).json()["engine"])
            if name == "one":
                unload(server, name)
        assert len(set(ids)) == 3
