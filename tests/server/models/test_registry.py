"""Requests reach the model that they name, each with its own engine, tokenizer and adapters."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from server.metrics import Metrics
from server.models.registry import ModelRegistry
from server.models.slot import ModelSlot
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, make_adapter
from tests.support.records import example_step
from tests.support.serving import RunningServer, check_error, make_test_context, own_address, running_server, wait_until

MESSAGES = [{"role": "user", "content": "Hi"}]
GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
    ("/api/chat", {"messages": MESSAGES, "stream": False}),
    ("/api/generate", {"prompt": "Hi", "stream": False}),
    ("/v1/embeddings", {"input": "Hi"}),
    ("/v1/rerank", {"query": "Hi", "documents": ["a"]}),
]


@dataclasses.dataclass
class TwoModels:
    server: RunningServer
    engines: dict[str, FakeEngine]  # by the name of the model

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.server.url + path, json=body)


@pytest.fixture(scope="module")
def two(model_folder: Path) -> Iterator[TwoModels]:
    """A server of the models `one` and `two`; `two` has the adapter `dialect`."""
    with ExitStack() as stack:
        engines: dict[str, FakeEngine] = {}
        slots: list[ModelSlot] = []
        for name in ("one", "two"):
            adapters = [make_adapter("dialect")] if name == "two" else []
            config = FakeEngineConfig(address=stack.enter_context(own_address()), adapters=adapters, max_loras=1)
            engines[name] = stack.enter_context(FakeEngine(config))
            context = make_test_context(config.address, model_folder)
            slot_config = replace(context.models.slots[0].config, names=(name,))
            metrics = Metrics("lightwell_", name)
            slots.append(ModelSlot(slot_config, metrics, dataclasses.replace(context.models.default, names=(name,))))
        context = dataclasses.replace(context, models=ModelRegistry(slots))
        server = stack.enter_context(running_server(context))
        wait_until(lambda: all(model.client.is_ready for model in context.models.loaded))
        yield TwoModels(server, engines)


def test_a_request_reaches_the_engine_of_its_model(two: TwoModels) -> None:
    for (path, body), (name, other) in product(GENERATING, (("one", "two"), ("two", "one"), ("dialect", "one"))):
        num_other = len(two.engines[other].submits)
        answer = two.post(path, {"model": name, **body})
        assert answer.status_code == 200, answer.text
        engine = two.engines["one" if name == "one" else "two"]
        assert engine.submits[-1].lora_name == ("dialect" if name == "dialect" else "")
        assert len(two.engines[other].submits) == num_other
        if path != "/v1/rerank":
            assert answer.json()["model"] == name


def test_all_models_are_listed(two: TwoModels) -> None:
    models = httpx.get(two.server.url + "/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("one", None), ("two", None), ("dialect", "two")]
    tags = httpx.get(two.server.url + "/api/tags").json()["models"]
    assert [model["name"] for model in tags] == ["one:latest", "two:latest", "dialect:latest"]


def test_a_request_must_name_its_model_if_there_are_several(two: TwoModels) -> None:
    error = check_error(two.post("/v1/completions", {"model": "three", "prompt": "Hi"}), 404)
    assert error["message"].endswith("Available models: `one`, `two`, `dialect`.")
    assert "model" in check_error(two.post("/v1/completions", {"prompt": "Hi"}), 400)["message"]


def test_what_the_engine_does_is_that_of_the_chosen_model(two: TwoModels) -> None:
    two.engines["two"].config.steps = [example_step(7)]
    url = two.server.url + "/lightwell/v1/steps"
    assert httpx.get(url).json()["data"] == httpx.get(url, params={"model": "one"}).json()["data"] == []
    for name in ("two", "dialect"):
        (step,) = httpx.get(url, params={"model": name}).json()["data"]
        assert step["id"] == 7
    check_error(httpx.get(url, params={"model": "three"}), 404)
