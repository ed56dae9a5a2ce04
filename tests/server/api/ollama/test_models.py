"""Descriptions of the served models in Ollama's form."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.ollama.models import short_number
from tests.server.conftest import StartServer
from tests.support.clients import shared_server
from tests.support.fake_engine import make_adapter
from tests.support.serving import RunningServer
from tests.support.tool_model import TEMPLATE, write_tool_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("secret-path"), special_tags=True)
    adapters = [make_adapter("sql", "/secret-path/sql")]
    with shared_server(folder, adapters=adapters, max_loras=1, vocab_size=263) as server:
        yield server


def show(server: RunningServer, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/api/show", json=fields)


def test_models(server: RunningServer) -> None:
    listed, loaded = (httpx.get(f"{server.url}/api/{path}").json()["models"] for path in ("tags", "ps"))
    tiny, organization, sql = listed
    assert [model["name"] for model in listed] == ["tiny:latest", "org/tiny:latest", "sql:latest"]
    assert tiny["model"] == tiny["name"]
    assert tiny["capabilities"] == ["completion", "tools", "thinking"]
    assert tiny["digest"] == organization["digest"] != sql["digest"]
    assert sql["details"] == {**tiny["details"], "parent_model": "tiny:latest"}
    assert [model["model"] for model in loaded] == [model["model"] for model in listed]
    assert {model["context_length"] for model in loaded} == {server.engine.config.max_model_len}
    assert all(datetime.fromisoformat(model["expires_at"]).timestamp() > 0 for model in loaded)
    assert {model["size_vram"] for model in loaded} == {0}  # the fake engine's device is a CPU


def test_properties_of_a_model(server: RunningServer, model_folder: Path) -> None:
    shown: dict[str, Any] = show(server, model="tiny:latest").json()
    assert shown == show(server, name="tiny").json()
    assert shown["template"] == TEMPLATE
    config, info = json.loads((model_folder / "config.json").read_text()), shown["model_info"]
    architecture = info["general.architecture"]
    assert info[f"{architecture}.embedding_length"] == config["hidden_size"]
    assert info[f"{architecture}.context_length"] == server.engine.config.max_model_len
    assert shown["details"]["family"] == architecture


def test_the_default_sampling_is_shown_by_ollamas_names(start_server: StartServer) -> None:
    server = start_server(default_sampling={"temperature": 0.6, "repetition_penalty": 1.1, "top_n_sigma": 1.0})
    lines = show(server, model="tiny").json()["parameters"].splitlines()
    assert [line.split() for line in lines] == [["temperature", "0.6"], ["repeat_penalty", "1.1"]]


def test_no_paths_are_revealed(server: RunningServer) -> None:
    answers = [show(server, model=name) for name in ("tiny", "sql", "other")]
    answers += [httpx.get(f"{server.url}/api/{path}") for path in ("tags", "ps", "version")]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 200, 200]
    for answer in answers:
        assert "secret-path" not in answer.text + str(answer.headers)


def test_short_numbers() -> None:
    numbers = [999, 1500, 134_515_008, 8_000_000, 8_030_261_248, 70_000_000_000]
    assert [short_number(number) for number in numbers] == ["999", "2K", "134.52M", "8M", "8.0B", "70B"]
