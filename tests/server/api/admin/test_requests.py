"""`POST /v1/requests/{id}/cancel` over real sockets, with a fake engine that never finishes."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, MINIMAL, choice_text
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until

REQUEST = MINIMAL[CHAT]


@pytest.fixture(autouse=True)
def _endless(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01


def cancel(server: RunningServer, request_id: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/requests/{request_id}/cancel")


def post(threads: ThreadPoolExecutor, server: RunningServer, path: str, **fields: Any) -> Future[httpx.Response]:
    """Send a request in a thread, with x-request-id `mine`, and return once tokens arrive."""
    body = MINIMAL[path] | {"max_tokens": 1000} | fields
    num_tokens, num_ids = server.metric("lightwell_generation_tokens_total"), len(server.context.running)
    answer = threads.submit(httpx.post, server.url + path, json=body, headers={"x-request-id": "mine"}, timeout=20)
    wait_until(lambda: len(server.context.running) > num_ids)
    wait_until(lambda: server.metric("lightwell_generation_tokens_total") > num_tokens)
    return answer


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_whole_answer(server: RunningServer, threads: ThreadPoolExecutor, path: str) -> None:
    answer = post(threads, server, path, n=2, logprobs={CHAT: True, COMPLETIONS: 0}[path])
    response = cancel(server, "mine")
    assert (response.status_code, response.json()) == (200, {"id": "mine", "cancelled": True})
    body = answer.result().json()
    for choice in body["choices"]:
        assert choice_text(choice).startswith("H")
        assert choice["finish_reason"] == "abort"
    assert 2 <= body["usage"]["completion_tokens"] < 2000
    wait_until(lambda: server.engine.num_choices == 0)
    assert server.model.client.num_in_flight == 0
    wait_until(lambda: len(server.context.running) == 0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, ANTHROPIC])
def test_a_stream_by_the_id_of_its_answer(server: RunningServer, path: str) -> None:
    body = MINIMAL[path] | {"max_tokens": 1000, "stream": True}
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
    other = threads.submit(httpx.post, server.url + CHAT, json=REQUEST | {"max_tokens": 100}, timeout=20)
    assert cancel(server, "mine").status_code == 200
    assert [answer.result().json()["choices"][0]["finish_reason"] for answer in answers] == ["abort", "abort"]
    assert other.result().json()["choices"][0]["finish_reason"] == "length"


def test_a_request_that_waits_for_its_turn(server: RunningServer, threads: ThreadPoolExecutor) -> None:
    server.engine.pause()
    answer = threads.submit(httpx.post, server.url + CHAT, json=REQUEST, headers={"x-request-id": "mine"})
    wait_until(lambda: len(server.context.running) == 2)
    assert cancel(server, "mine").status_code == 200
    (choice,) = answer.result().json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "abort")


def test_cancel_unknown_request(server: RunningServer) -> None:
    done = httpx.post(server.url + CHAT, json=REQUEST | {"max_tokens": 1}).json()
    for request_id in (done["id"], "unknown", "x" * 1000):
        error = check_error(cancel(server, request_id), 404)
        assert (error["code"], error["param"]) == ("request_not_found", None)
        assert error["message"].startswith(f"No request with the id '{request_id[:128]}")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_by_a_name_of_the_clients(server: RunningServer, threads: ThreadPoolExecutor, path: str) -> None:
    answer = post(threads, server, path, request_id="job-7")
    assert cancel(server, "job-7").json() == {"id": "job-7", "cancelled": True}
    assert answer.result().headers["x-request-id"] == "mine"
    assert cancel(server, "job-7").status_code == 404
