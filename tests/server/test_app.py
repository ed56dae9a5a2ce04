"""Tests of the whole application: routes, models, the official SDK, and many clients at once."""

import asyncio
import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import anyio
import httpx
import openai
import pytest

from tests.server.conftest import StartServer
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, raw_request, wait_until
from tests.support.tiny_tokenizer_model import MAX_MODEL_LEN

JSON_TYPE = {"content_type": "application/json"}


def test_models(server: RunningServer) -> None:
    """Their ids may have slashes."""
    models = httpx.get(server.url + "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "org/tiny"]
    assert httpx.get(server.url + "/v1/models/tiny").json() == models[0]
    assert check_error(httpx.get(server.url + "/v1/models/other"), 404)["code"] == "model_not_found"
    card = {"id": "org/tiny", "object": "model", "owned_by": "lightwell", "root": "tiny", "parent": None}
    state = {"created": server.context.created, "state": "loaded", "max_model_len": MAX_MODEL_LEN}
    formats = {"tool_format": "generic", "reasoning_format": None}
    defaults: dict[str, Any] = {"default_max_tokens": None, "default_sampling": {}, "default_sampling_sources": {}}
    assert httpx.get(server.url + "/v1/models/org/tiny").json() == card | state | formats | defaults
    check_error(httpx.get(server.url + "/v1/models/tiny/x"), 404)


def test_version(server: RunningServer) -> None:
    assert httpx.get(server.url + "/version").json()["version"] == importlib.metadata.version("lightwell")


@pytest.mark.checklist("G10")
def test_the_sdk_does_not_retry_a_bad_request(server: RunningServer) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x") as client, pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", n=1000)
    labels = {"handler": "/v1/completions", "method": "POST", "status": "400"}
    wait_until(lambda: server.metric("http_requests_total", **labels) == 1)
    assert server.metric("lightwell_retried_requests_total") == 0


async def complete(client: httpx.AsyncClient, number: int) -> httpx.Response:
    body = {"model": "tiny", "prompt": f"p{number}", "n": 1 + number % 3, "stream": number % 2 == 0, "max_tokens": 20}
    return await client.post("/v1/completions", json=body, timeout=60)


@pytest.mark.checklist("E02")
@pytest.mark.anyio
async def test_every_request_of_a_burst_is_answered(start_server: StartServer, fake_engine: FakeEngine) -> None:
    server = start_server(max_queued_requests=80, server={"max_connections": 1024})
    fake_engine.config.max_num_seqs = 64
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:
        responses = await asyncio.gather(*(complete(client, number) for number in range(200)))
    by_status = {status: sum(r.status_code == status for r in responses) for status in (200, 429)}
    assert sum(by_status.values()) == 200
    assert by_status[200] > 20
    for number, response in enumerate(responses):
        if response.status_code == 200 and number % 2 == 0:
            assert response.text.endswith("data: [DONE]\n\n")
            assert response.text.count("[DONE]") == 1
            assert "error" not in response.text
        elif response.status_code == 200:
            assert len(response.json()["choices"]) == 1 + number % 3
    assert server.model.client.num_in_flight == 0
    wait_until(lambda: fake_engine.num_choices == 0)


@pytest.mark.checklist("E09")
@pytest.mark.anyio
async def test_clients_that_disconnect_at_any_time_leave_nothing_behind(
    start_server: StartServer, fake_engine: FakeEngine
) -> None:
    server = start_server()
    fake_engine.config.step_seconds = 0.002

    async def disconnect(number: int) -> None:
        body = {"model": "tiny", "prompt": "x", "stream": number % 2 == 0, "max_tokens": 50}
        async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
            await stream.send(raw_request("POST", "/v1/completions", json.dumps(body).encode(), **JSON_TYPE))
            with anyio.move_on_after(number % 25 * 0.002):
                await stream.receive()

    await asyncio.gather(*(disconnect(number) for number in range(100)))
    wait_until(lambda: server.model.client.num_in_flight == 0)
    wait_until(lambda: fake_engine.num_choices == 0)
    finished = [
        server.metric("lightwell_request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    ]
    wait_until(lambda: len(fake_engine.submits) == sum(finished))  # the engine may not have read the last requests yet
    wait_until(lambda: fake_engine.num_choices == 0)


def test_the_api_process_imports_nothing_heavy_and_starts_nothing() -> None:
    heavy = {"torch", "numpy", "transformers", "huggingface_hub", "gguf", "safetensors", "rich", "opentelemetry.sdk"}
    code = "import sys, threading, server.main as m; print(threading.active_count(), 'app' in dir(m), *sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    num_threads, has_app, *modules = output.split()
    assert (num_threads, has_app, heavy & set(modules)) == ("1", "False", set())
