"""Health in each state of the engine and of the server, and requests that are cancelled."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.server.dialects import LOAD, UNLOAD
from tests.server.kinds import CHESS
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, MINIMAL, ask, choice_text
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.serving import RunningServer, check_error, make_test_context, running_server, wait_until

PROBES = ("/health", "/healthz", "/readyz")


def statuses(server: RunningServer) -> tuple[int, ...]:
    """Return the status codes of PROBES."""
    responses = [httpx.get(server.url + path) for path in PROBES]
    for response in responses:
        if response.status_code != 200:
            assert check_error(response, 503)["type"] == "service_unavailable_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
    return tuple(response.status_code for response in responses)


@pytest.mark.checklist("G05")
def test_ready(server: RunningServer) -> None:
    """Whatever else the event loop has to do, which is tested where it is done: none of it waits in these routes."""
    assert statuses(server) == (200, 200, 200)
    assert [httpx.head(server.url + path).status_code for path in PROBES] == [200] * 3


@pytest.mark.checklist("G04")
def test_loading(address: str, model_folder: Path) -> None:
    """An adapter that is loaded with the engine is not unknown before."""
    config = FakeEngineConfig(address=address, never_ready=True, adapters=[CHESS], max_loras=1)
    adapters = {"lora_modules": ("chess=/adapters/chess",), "allow_runtime_lora_updating": True}
    context = make_test_context(address, model_folder, **adapters)
    with FakeEngine(config) as engine, running_server(context, engine, wait_ready=False) as server:
        assert statuses(server) == (503, 200, 503)
        for model, status in (("tiny", 503), ("chess", 503), ("checkers", 404)):
            check_error(ask(server.url, CHAT, model=model), status)
        for path in ("/v1/models", "/lightwell/v1/steps"):
            check_error(httpx.get(server.url + path), 503)
        check_error(ask(server.url, LOAD, model=..., lora_name="a", lora_path="/"), 503)
        check_error(ask(server.url, UNLOAD, model=..., lora_name="chess"), 503)
        assert "num_requests_running" in httpx.get(server.url + "/metrics").text
        config.never_ready = False
        wait_until(lambda: statuses(server) == (200, 200, 200))


def test_draining(start_server: StartServer) -> None:
    server = start_server()
    server.model.client.drain()
    assert statuses(server) == (200, 200, 503)
    response = ask(server.url, COMPLETIONS)
    check_error(response, 503)
    assert response.headers["connection"] == "close"


@pytest.mark.checklist("G05")
def test_hanging_and_dead(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/server/engine_client tests how the server notices it."""
    server = start_server()
    liveness = server.model.client.engines[0].liveness
    monkeypatch.setattr(liveness, "_is_silent", lambda: True)
    assert statuses(server) == (503, 503, 503)
    wait_until(lambda: liveness.dead_reason)
    assert statuses(server) == (503, 503, 503)
    check_error(ask(server.url, COMPLETIONS), 503)


# Cancelled requests.


def cancel(server: RunningServer, request_id: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/requests/{request_id}/cancel")


def post(threads: ThreadPoolExecutor, server: RunningServer, path: str, **fields: Any) -> Future[httpx.Response]:
    """Send a request in a thread, with x-request-id `mine`, and return once tokens arrive."""
    body = MINIMAL[path] | {"max_tokens": 1000} | fields
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01
    num_tokens, num_ids = server.metric("lightwell_generation_tokens_total"), len(server.context.running)
    answer = threads.submit(httpx.post, server.url + path, json=body, headers={"x-request-id": "mine"}, timeout=20)
    wait_until(lambda: len(server.context.running) > num_ids)
    wait_until(lambda: server.metric("lightwell_generation_tokens_total") > num_tokens)
    return answer


@pytest.mark.parametrize("name", ["mine", "job-7"])  # in a header, and in the body
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_whole_answer(server: RunningServer, threads: ThreadPoolExecutor, path: str, name: str) -> None:
    answer = post(threads, server, path, n=2, logprobs={CHAT: True, COMPLETIONS: 0}[path], request_id="job-7")
    response = cancel(server, name)
    assert (response.status_code, response.json()) == (200, {"id": name, "cancelled": True})
    assert answer.result().headers["x-request-id"] == "mine"
    body = answer.result().json()
    assert [(choice_text(each)[0], each["finish_reason"]) for each in body["choices"]] == [("H", "abort")] * 2
    assert 2 <= body["usage"]["completion_tokens"] < 2000
    wait_until(lambda: server.engine.num_choices == len(server.context.running) == 0)
    assert server.model.client.num_in_flight == 0
    assert cancel(server, name).status_code == 404


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, ANTHROPIC])
def test_a_stream_by_the_id_of_its_answer(server: RunningServer, path: str) -> None:
    body = MINIMAL[path] | {"max_tokens": 1000, "stream": True}
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01
    with httpx.stream("POST", server.url + path, json=body, timeout=20) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        first = json.loads(next(lines))
        assert cancel(server, first.get("id") or first["message"]["id"]).status_code == 200
        *events, last = lines
    if path == ANTHROPIC:
        assert json.loads(events[-1])["delta"]["stop_reason"] == "pause_turn"
        assert json.loads(last) == {"type": "message_stop"}
    else:
        assert json.loads(events[-1])["choices"][0]["finish_reason"] == "abort"
        assert last == "[DONE]"
    wait_until(lambda: server.model.client.num_in_flight == 0 and len(server.context.running) == 0)


@pytest.mark.checklist("E12")
def test_one_id_of_two_requests(server: RunningServer, threads: ThreadPoolExecutor) -> None:
    answers = [post(threads, server, CHAT) for _ in range(2)]
    other = threads.submit(httpx.post, server.url + CHAT, json=MINIMAL[CHAT] | {"max_tokens": 100}, timeout=20)
    assert cancel(server, "mine").status_code == 200
    assert [answer.result().json()["choices"][0]["finish_reason"] for answer in answers] == ["abort", "abort"]
    assert other.result().json()["choices"][0]["finish_reason"] == "length"


def test_a_request_that_waits_for_its_turn(server: RunningServer, threads: ThreadPoolExecutor) -> None:
    server.engine.pause()
    answer = threads.submit(httpx.post, server.url + CHAT, json=MINIMAL[CHAT], headers={"x-request-id": "mine"})
    wait_until(lambda: len(server.context.running) == 2)
    assert cancel(server, "mine").status_code == 200
    (choice,) = answer.result().json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "abort")


def test_cancel_unknown_request(server: RunningServer) -> None:
    done = httpx.post(server.url + CHAT, json=MINIMAL[CHAT] | {"max_tokens": 1}).json()
    for request_id in (done["id"], "unknown", "x" * 1000):
        error = check_error(cancel(server, request_id), 404)
        assert (error["code"], error["param"]) == ("request_not_found", None)
        assert error["message"].startswith(f"No request with the id '{request_id[:128]}")
