"""What the clients of several tenants see when the queue is full, over real sockets."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.generation import pipeline
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_envelope, check_error, wait_until

CAPACITY = 6


@pytest.fixture
def server(start_server: StartServer, fake_engine: FakeEngine) -> RunningServer:
    """A server of two keys with capacity for six choices, whose engine is paused."""
    fake_engine.config.max_num_seqs = 2
    fake_engine.pause()
    return start_server(api_key=("alice", "bob"), max_queued_requests=CAPACITY - 2)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def ask(server: RunningServer, key: str, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    prompt: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "tiny", "max_tokens": 9} | prompt | fields
    return httpx.post(server.url + path, json=body, headers=headers, timeout=30)


def fill(
    server: RunningServer, threads: ThreadPoolExecutor, num_requests: int, **fields: Any
) -> list[Future[httpx.Response]]:
    """Send requests of Alice, one after the other."""
    futures = []
    for number in range(num_requests):
        futures.append(threads.submit(ask, server, "alice", **fields))
        wait_until(lambda: server.engine.num_choices == number + 1)  # noqa: B023
    return futures


@pytest.mark.parametrize("stream", [True, False])
def test_another_key_is_admitted_and_the_newest_get_a_real_429(
    server: RunningServer, fake_engine: FakeEngine, threads: ThreadPoolExecutor, stream: bool
) -> None:
    alice = fill(server, threads, CAPACITY, stream=stream)
    bob = [threads.submit(ask, server, "bob", stream=stream) for _ in range(CAPACITY // 2)]
    for future in alice[CAPACITY // 2 :]:
        response = future.result()
        assert check_error(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert check_error(ask(server, "bob"), 429)["code"] == "rate_limit_exceeded"
    fake_engine.resume()
    assert [future.result().status_code for future in bob + alice[: CAPACITY // 2]] == [200] * CAPACITY
    assert server.model.client.num_in_flight == 0
    assert server.metric("lightwell_requests_rejected_total", reason="evicted") == CAPACITY // 2
    assert server.metric("lightwell_requests_rejected_total", reason="queue_full") == 1


def test_a_stream_that_has_its_status_gets_an_error_event(
    server: RunningServer, fake_engine: FakeEngine, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_HELD_SECONDS", 0.01)
    fill(server, threads, CAPACITY - 1, stream=True)
    time.sleep(0.2)  # all of them get their status
    body = {"model": "tiny", "messages": MESSAGES, "stream": True}
    headers = {"authorization": "Bearer alice"}
    with httpx.stream("POST", server.url + CHAT, json=body, headers=headers, timeout=30) as response:
        assert response.status_code == 200
        bob = [threads.submit(ask, server, "bob") for _ in range(CAPACITY // 2)]
        *_, error, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert check_envelope(error.encode())["code"] == "rate_limit_exceeded"
    assert done == "[DONE]"
    fake_engine.resume()
    assert [future.result().status_code for future in bob] == [200] * len(bob)


def data(response: httpx.Response) -> list[str]:
    """Return the events of a complete stream, without the last one."""
    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert "error" not in events[-1]
    return events


def test_one_request_with_all_choices_does_not_keep_others_out(
    server: RunningServer, fake_engine: FakeEngine, threads: ThreadPoolExecutor
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    fake_engine.resume()
    alice = threads.submit(ask, server, "alice", prompt=["x", "y"], n=CAPACITY // 2, max_tokens=200, stream=True)
    wait_until(lambda: server.metric("lightwell_num_requests_running") == 2)
    bob = [threads.submit(ask, server, "bob", max_tokens=2) for _ in range(CAPACITY // 2)]
    wait_until(lambda: server.model.client.num_in_flight == CAPACITY + CAPACITY // 2)
    check_error(ask(server, "alice"), 429)
    assert [future.result().status_code for future in bob] == [200] * len(bob)
    assert sum(event.count('"finish_reason":"length"') for event in data(alice.result())) == CAPACITY


def test_a_client_that_leaves_before_its_status_frees_its_place(server: RunningServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.url + COMPLETIONS,
            json={"model": "tiny", "prompt": "x", "stream": True},
            headers={"authorization": "Bearer alice"},
            timeout=0.3,
        )
    wait_until(lambda: server.model.client.num_in_flight == 0 == server.engine.num_choices)


SCORING: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["x", "y"]},
    "/v1/rerank": {"query": "x", "documents": ["y", "z"]},
    "/v1/score": {"text_1": "x", "text_2": "y"},
}


@pytest.mark.parametrize("path", SCORING)
def test_a_request_for_embeddings_or_scores_can_limit_its_wait(server: RunningServer, path: str) -> None:
    def post(**fields: Any) -> httpx.Response:
        body, headers = {"model": "tiny"} | SCORING[path] | fields, {"authorization": "Bearer alice"}
        return httpx.post(server.url + path, json=body, headers=headers, timeout=30)

    error = check_error(post(queue_timeout=0.2), 503)
    assert error["code"] == "request_timeout"
    assert "0.2 seconds" in error["message"]
    wait_until(lambda: server.model.client.num_in_flight == 0 == server.engine.num_choices)
    assert check_error(post(queue_timeout=0), 400)["param"] == "queue_timeout"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_can_limit_its_wait(server: RunningServer, path: str, stream: bool) -> None:
    response = ask(server, "alice", path, stream=stream, queue_timeout=0.2)
    error = check_error(response, 503)
    assert error["code"] == "request_timeout"
    assert "0.2 seconds" in error["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 60
    wait_until(lambda: server.model.client.num_in_flight == 0 == server.engine.num_choices)
    check_error(ask(server, "alice", queue_timeout=0), 400)


def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    start_server: StartServer, fake_engine: FakeEngine
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    server = start_server(request_timeout=0.5)
    response = ask(server, "any", stream=True, max_tokens=2000)
    first, *_, error, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert "choices" in first
    assert check_envelope(error.encode())["code"] == "request_timeout"
    assert done == "[DONE]"
    wait_until(lambda: server.model.client.num_in_flight == 0 == server.engine.num_choices)
