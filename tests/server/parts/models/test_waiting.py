"""Requests wait for their model: streams with comments, so that proxies keep the connection."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.parts.models.manager import IDLE_POLL_SECONDS
from server.parts.models.waiting import COMMENT_SECONDS, MAX_HELD_SECONDS
from tests.server.api.test_contract import ACTING, RERANK
from tests.server.dialects import DETOKENIZE, EMBEDDINGS, INPUT_TOKENS, TOKENIZE, Reader
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, MINIMAL, OLLAMA_GENERATE, RESPONSES, ask
from tests.support.fake_engine import make_adapter
from tests.support.serving import check_error, wait_until
from tests.support.several_models import SeveralModels, several_models, unload

STREAMS = dict.fromkeys((COMPLETIONS, CHAT), "data: [DONE]")
STREAMS |= {RESPONSES: "event: response.completed", ANTHROPIC: "event: message_stop"}


def reader_with_comment(server: SeveralModels, path: str) -> Reader:
    """Return the reader of a stream that has waited for its model until the status and a comment were sent."""
    reader = Reader(server.url + path, "POST", MINIMAL[path] | {"model": "one", "stream": True})
    wait_until(lambda: server.slots[0].num_users == 1)
    for seconds in (0, MAX_HELD_SECONDS):  # the timer is set when the loop has nothing more to do
        server.turn(seconds)
    wait_until(lambda: reader.text.count(": loading one, ") == 1)
    server.turn(0)
    return reader


def test_a_stream_has_comments_while_its_model_is_loaded(model_folder: Path) -> None:
    with several_models(model_folder, engines={"never_ready": True}) as server:
        for path, end in STREAMS.items():
            server.supervisor.configs[0].never_ready = True
            reader = reader_with_comment(server, path)
            server.turn(COMMENT_SECONDS)
            wait_until(lambda reader=reader: reader.text.count(": loading one, ") == 2)
            server.supervisor.configs[0].never_ready = False
            assert end in reader.join()
            wait_until(lambda: server.slots[0].num_users == 0)
            again = ask(server.url, path, model="one", stream=True)  # as from a model that is loaded
            assert (": loading" in again.text, end in again.text) == (False, True)
            unload(server, "one")


def test_a_stream_ends_with_an_error_if_its_model_cannot_be_loaded(model_folder: Path) -> None:
    with several_models(model_folder, engines={"never_ready": True}, queue_timeout=60.0) as server:
        for path, end in STREAMS.items():
            reader = reader_with_comment(server, path)
            server.turn(60)
            text = reader.join()
            assert "The model `one` is still being loaded." in text
            assert (end in text) == (end == "data: [DONE]")


INVALID: list[tuple[str, dict[str, Any], str]] = [
    *((path, {"temperature": 99}, "temperature") for path in STREAMS),
    (COMPLETIONS, {"response_format": {"type": "x"}}, "response_format"),
    (COMPLETIONS, {"n": 2, "best_of": 1}, "best_of"),  # each is valid, but not both
    *((COMPLETIONS, {"queue_timeout": value}, "queue_timeout") for value in (-3, 0, True, "3")),
    (EMBEDDINGS, {"input": {}}, "input"),
    (RERANK, {"query": "a"}, "documents"),
    (TOKENIZE, {"prompt": 1}, "prompt"),
    (OLLAMA_GENERATE, {"options": 1}, "options"),
]


def test_an_invalid_request_loads_nothing(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        for path, body, field in INVALID:
            for is_stream in (False, True):
                answer = ask(server.url, path, model="one", stream=is_stream, **body)
                assert (answer.status_code, field in answer.text) == (400, True), (path, answer.text)
        body = {"lora_name": "dialect", "lora_path": "/adapters/dialect", "base_model_name": "one"}
        check_error(httpx.post(server.url + "/v1/load_lora_adapter", json=body), 404)  # not allowed
        assert server.supervisor.orders == []


def test_a_model_is_described_before_it_is_loaded(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        info = ask(server.url, "/api/show", model="one").json()["model_info"]
        config = json.loads((model_folder / "config.json").read_text())
        assert info[f"{info['general.architecture']}.context_length"] == config["max_position_embeddings"]
        assert server.supervisor.orders == []


def test_a_short_load_leaves_the_status_to_the_answer(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        for path in STREAMS:
            assert ": loading" not in ask(server.url, path, model="one", stream=True).text
            assert ask(server.url, path, model="one", stream=True, temperature=99).status_code == 400
            unload(server, "one")


def ask_without_name(server: SeveralModels, path: str) -> httpx.Response:
    return ask(server.url, path, **ACTING[path][1] | {"model": ...})


def test_the_only_model_is_loaded_if_a_request_names_none(model_folder: Path) -> None:
    models: tuple[dict[str, Any], ...] = ({"lora_modules": ("dialect=/adapters/dialect",)},)
    engines = {"adapters": [make_adapter("dialect")], "max_loras": 1}
    with several_models(model_folder, models=models, engines=engines) as server:
        for path in (TOKENIZE, DETOKENIZE, INPUT_TOKENS):
            assert ask_without_name(server, path).status_code == 200
            unload(server, "one")


def test_a_request_must_name_one_of_several_models(model_folder: Path) -> None:
    with several_models(model_folder) as server:
        for path in (TOKENIZE, DETOKENIZE, INPUT_TOKENS, EMBEDDINGS, RERANK):
            assert "model" in check_error(ask_without_name(server, path), 400)["message"]
        assert server.supervisor.orders == []


def test_a_replay_and_an_inspection_wait_for_their_own_model(model_folder: Path) -> None:
    with several_models(model_folder, record_requests=4) as server:
        request_id, inspected = server.complete("two").json()["id"], {"model": "two", "prompt": "Hi"}
        for path, body in ((f"/v1/requests/{request_id}/replay", None), ("/lightwell/v1/inspect", inspected)):
            unload(server, "two")
            answer = httpx.post(server.url + path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert server.states == {"one": "unloaded", "two": "loaded"}


@pytest.mark.parametrize(
    ("body", "status"), [({}, 200), ({"prompt": "Hi", "stream": False, "options": {"temperature": "hot"}}, 400)]
)
def test_a_keep_alive_without_effect_is_not_kept(model_folder: Path, body: dict[str, Any], status: int) -> None:
    with several_models(model_folder) as server:
        if status != 200:
            server.complete("one")
        answer = httpx.post(server.url + OLLAMA_GENERATE, json={"model": "one", "keep_alive": 0, **body})
        assert answer.status_code == status, answer.text
        server.complete("one")
        wait_until(lambda: server.slots[0].num_users == 0)
        for _ in range(3):
            server.turn(IDLE_POLL_SECONDS)
        assert server.states["one"] == "loaded"
        assert len(server.supervisor.orders) == 1  # it has not been unloaded meanwhile


def test_each_engine_has_its_own_id(model_folder: Path) -> None:
    with several_models(model_folder, in_processes=True) as server:
        ids = set()
        for name in ("one", "two", "one"):
            server.complete(name)
            ids.add(httpx.get(f"{server.url}/lightwell/v1/engine?model={name}").json()["engine"])
            unload(server, name)
        assert len(ids) == 3
