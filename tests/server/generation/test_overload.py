"""What the clients of several tenants see when the queue is full, over real sockets."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.generation.pipeline import MAX_HELD_SECONDS
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, shared_server
from tests.support.serving import RunningServer, check_envelope, check_error, raw_request, wait_until

CAPACITY = 6
QUESTIONS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x"},
    CHAT: {"messages": MESSAGES},
    "/v1/embeddings": {"input": ["x", "y"]},
    "/v1/rerank": {"query": "x", "documents": ["y", "z"]},
    "/v1/score": {"text_1": "x", "text_2": "y"},
}


@pytest.fixture(scope="module")
def shared(model_folder: Path) -> Iterator[RunningServer]:
    settings = {"api_key": ("alice", "bob"), "max_queued_requests": CAPACITY - 2, "queue_timeout": 1000}
    with shared_server(model_folder, settings=settings, max_num_seqs=2) as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    """A server of two keys with capacity for six choices, whose engine is paused."""
    shared.engine.pause()
    yield shared
    shared.reset()


@pytest.fixture
def threads(server: RunningServer) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def ask(server: RunningServer, key: str = "alice", path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "tiny", "max_tokens": 9} | QUESTIONS[path] | fields
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def is_at_rest(server: RunningServer) -> bool:
    """Whether nothing is left of any request."""
    return server.model.client.num_in_flight == 0 == server.engine.num_choices


def test_a_stream_that_has_its_status_gets_an_error_event(server: RunningServer, threads: ThreadPoolExecutor) -> None:
    def all_have_their_status() -> bool:
        server.turn(MAX_HELD_SECONDS)
        return all(request.is_answered for request in server.model.client._shares.requests())

    alice = []
    for number in range(CAPACITY):
        alice.append(threads.submit(ask, server, stream=True))
        wait_until(lambda: server.engine.num_choices == number + 1)  # noqa: B023
    wait_until(all_have_their_status)
    bob = [threads.submit(ask, server, "bob") for _ in range(CAPACITY // 2)]
    for future in alice[CAPACITY // 2 :]:
        response = future.result()
        assert response.status_code == 200
        *_, error, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert check_envelope(error.encode())["code"] == "rate_limit_exceeded"
        assert done == "[DONE]"
    server.engine.resume()
    assert [future.result().status_code for future in bob] == [200] * len(bob)


def test_one_request_with_all_choices_does_not_keep_others_out(
    server: RunningServer, threads: ThreadPoolExecutor
) -> None:
    server.engine.config.num_prompt_steps, server.engine.config.step_seconds = 10**9, 0.01
    server.engine.resume()
    alice = threads.submit(ask, server, prompt=["x", "y"], n=CAPACITY // 2, stream=True)
    wait_until(lambda: server.metric("lightwell_num_requests_running") == 2)
    bob = [threads.submit(ask, server, "bob", max_tokens=2) for _ in range(CAPACITY // 2)]
    wait_until(lambda: server.model.client.num_in_flight == CAPACITY + CAPACITY // 2)
    check_error(ask(server), 429)
    server.engine.config.num_prompt_steps = 0
    assert [future.result().status_code for future in bob] == [200] * len(bob)
    assert "error" not in alice.result().text
    assert alice.result().text.count('"finish_reason":"length"') == CAPACITY


def test_a_client_that_leaves_before_its_status_frees_its_place(server: RunningServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
    head = {"authorization": "Bearer alice", "content_type": "application/json"}
    with server.connect() as connection:
        connection.sendall(raw_request("POST", COMPLETIONS, body, **head))
        wait_until(lambda: server.engine.num_choices == 1)
    wait_until(lambda: is_at_rest(server))


@pytest.mark.parametrize(
    ("path", "fields", "seconds"),
    [
        (CHAT, {"stream": True}, MAX_HELD_SECONDS - 0.5),  # afterwards, it has its status
        ("/v1/embeddings", {}, 300.5),
        ("/v1/rerank", {}, 300.5),
        ("/v1/score", {}, 300.5),
    ],
)
def test_a_request_can_limit_its_wait(
    server: RunningServer, threads: ThreadPoolExecutor, path: str, fields: dict[str, Any], seconds: float
) -> None:
    assert check_error(ask(server, path=path, queue_timeout=0), 400)["param"] == "queue_timeout"
    answer = threads.submit(ask, server, path=path, queue_timeout=seconds, **fields)
    wait_until(lambda: server.engine.num_choices)
    server.turn(seconds)
    error = check_error(answer.result(), 503)
    assert error["code"] == "request_timeout"
    assert f"{seconds} seconds" in error["message"]
    assert 1 <= int(answer.result().headers["retry-after"]) <= 60
    wait_until(lambda: is_at_rest(server))
