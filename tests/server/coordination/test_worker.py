"""Requests through a worker and the coordinator: one capacity, the same limits, and the same answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.coordination.relay import Relay
from server.generation import pipeline
from tests.server.conftest import StartPair
from tests.support.clients import CHAT, COMPLETIONS, MINIMAL, parse_events
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_envelope, check_error, wait_until
from tests.support.workers import Pair

EMBEDDINGS = "/v1/embeddings"
KEYS = ("key-one", "key-two")
ENDLESS = 100_000  # tokens; no test waits for the last one

Start = Callable[..., "Future[httpx.Response]"]
Kind = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
Order = pytest.mark.parametrize("is_worker_first", [False, True], ids=["coordinator first", "worker first"])


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that sends a request in a thread."""
    with ThreadPoolExecutor(8) as threads:

        def start(server: RunningServer, path: str = COMPLETIONS, key: str = KEYS[0], **fields: Any) -> Any:
            return threads.submit(send, server, path, key, **fields)

        yield start


def send(server: RunningServer, path: str = COMPLETIONS, key: str = KEYS[0], **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.url + path, json=MINIMAL.get(path, {}) | fields, headers=headers, timeout=60)


def ordered(pair: Pair, is_worker_first: bool) -> Pair:
    coordinator, worker = pair
    return (worker, coordinator) if is_worker_first else (coordinator, worker)


def wait_for_choices(coordinator: RunningServer, number: int) -> None:
    """Wait until as many choices are in flight, by the only process that counts them."""
    wait_until(lambda: coordinator.model.client.num_in_flight == number, 30)


def wait_for_rest(coordinator: RunningServer) -> None:
    """Wait until nothing is left of the requests of the worker."""
    (relay,) = coordinator.context.workers
    assert isinstance(relay, Relay)
    held: tuple[dict[Any, Any], ...] = (relay._held, relay._uses, relay._streams, relay._admitted)
    wait_until(lambda: not any(held) and coordinator.model.client.num_in_flight == 0, 30)


def check_end(response: httpx.Response, stream: bool) -> None:
    """Assert that a request has been answered to its end."""
    assert response.status_code == 200, response.text
    chunks = parse_events(response.text) if stream else [response.json()]
    assert [reason for chunk in chunks for reason in [chunk["choices"][0]["finish_reason"]] if reason] == ["stop"]


@Kind
@Order
def test_there_is_one_capacity(
    start_pair: StartPair, fake_engine: FakeEngine, start: Start, is_worker_first: bool, stream: bool
) -> None:
    fake_engine.config.max_num_seqs = 1
    fake_engine.pause()
    pair = start_pair(max_queued_requests=1)
    coordinator, _ = pair
    first, second = ordered(pair, is_worker_first)
    answers = [start(first, stream=stream)]
    wait_for_choices(coordinator, 1)
    answers.append(start(second, stream=stream))
    wait_for_choices(coordinator, 2)
    for server in pair:
        for path in (COMPLETIONS, CHAT):
            response = send(server, path, stream=stream)
            assert check_error(response, 429)["code"] == "rate_limit_exceeded"
            assert int(response.headers["retry-after"]) >= 1
        assert check_error(send(server, n=3), 400)["param"] == "n"
    fake_engine.resume()
    for answer in answers:
        check_end(answer.result(), stream)
    wait_for_rest(coordinator)
    assert coordinator.metric("lightwell_requests_rejected_total", reason="queue_full") == 4


@Kind
@Order
def test_a_waiting_request_makes_room_for_a_tenant_of_the_other_process(
    start_pair: StartPair, fake_engine: FakeEngine, start: Start, is_worker_first: bool, stream: bool
) -> None:
    fake_engine.config.max_num_seqs = 1
    fake_engine.pause()
    pair = start_pair(max_queued_requests=1, api_key=KEYS)
    coordinator, _ = pair
    first, second = ordered(pair, is_worker_first)
    older = start(first, stream=stream)
    wait_for_choices(coordinator, 1)
    newer = start(first, stream=stream)
    wait_for_choices(coordinator, 2)
    other = start(second, key=KEYS[1], stream=stream)
    response = newer.result()
    assert check_error(response, 429)["code"] == "rate_limit_exceeded"
    assert int(response.headers["retry-after"]) >= 1
    fake_engine.resume()
    check_end(older.result(), stream)
    check_end(other.result(), stream)
    wait_for_rest(coordinator)


@Order
def test_a_request_with_a_status_makes_room_last(
    start_pair: StartPair,
    fake_engine: FakeEngine,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    is_worker_first: bool,
) -> None:
    monkeypatch.setattr(pipeline, "MAX_HELD_SECONDS", 0.05)
    fake_engine.config.max_num_seqs = 1
    fake_engine.pause()
    pair = start_pair(max_queued_requests=1, api_key=KEYS)
    coordinator, _ = pair
    first, second = ordered(pair, is_worker_first)
    without_status = start(first)
    wait_for_choices(coordinator, 1)
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    body = MINIMAL[COMPLETIONS] | {"stream": True}
    with httpx.stream("POST", first.url + COMPLETIONS, json=body, headers=headers, timeout=60) as streamed:
        assert streamed.status_code == 200
        time.sleep(0.2)  # the coordinator has been told
        other = start(second, key=KEYS[1])
        check_error(without_status.result(), 429)
        fake_engine.resume()
        assert '"finish_reason":"stop"' in streamed.read().decode()
    check_end(other.result(), stream=False)
    wait_for_rest(coordinator)


@Kind
@pytest.mark.parametrize("timeout", ["queue_timeout", "request_timeout"])
def test_timeouts(start_pair: StartPair, fake_engine: FakeEngine, start: Start, timeout: str, stream: bool) -> None:
    if timeout == "queue_timeout":
        fake_engine.pause()
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.02
    coordinator, worker = start_pair(**{timeout: 0.5})
    responses = [start(server, stream=stream, max_tokens=1000).result() for server in (coordinator, worker)]
    if stream and timeout == "request_timeout":
        errors = [response.text.strip().split("\n\n")[-2:] for response in responses]
        assert errors[0] == errors[1]
        assert errors[0][1] == "data: [DONE]"
        assert check_envelope(errors[0][0].removeprefix("data: ").encode())["code"] == "request_timeout"
        assert [response.status_code for response in responses] == [200, 200]
    else:
        assert check_error(responses[0], 503) == check_error(responses[1], 503)
        assert {*responses[0].headers} == {*responses[1].headers}
    assert coordinator.metric("lightwell_requests_rejected_total", reason=timeout) == 2
    wait_for_rest(coordinator)


def test_a_request_says_how_long_it_waits(start_pair: StartPair, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    coordinator, worker = start_pair()
    first, second = (send(server, queue_timeout=0.2) for server in (coordinator, worker))
    assert check_error(first, 503) == check_error(second, 503)
    wait_for_rest(coordinator)


@Kind
def test_a_disconnect_returns_capacity(start_pair: StartPair, fake_engine: FakeEngine, stream: bool) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    coordinator, worker = start_pair()
    with worker.connect() as connection:
        connection.sendall(_post(COMPLETIONS, n=2, max_tokens=1000, stream=stream))
        wait_for_choices(coordinator, 2)
        wait_until(lambda: fake_engine.num_choices == 2)
        if stream:
            assert connection.recv(100)
    wait_until(lambda: fake_engine.num_choices == 0, 30)
    wait_for_rest(coordinator)
    assert coordinator.metric("lightwell_request_success_total", finished_reason="abort") == 2


def test_a_disconnect_while_tokenizing_returns_capacity(
    start_pair: StartPair, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, worker = start_pair()
    disconnected, tokenize = threading.Event(), pipeline._tokenize

    def slow(job: Any) -> Any:
        assert disconnected.wait(30)
        return tokenize(job)

    monkeypatch.setattr(pipeline, "_tokenize", slow)
    fake_engine.pause()
    with worker.connect() as connection:
        connection.sendall(_post(COMPLETIONS))
        wait_for_choices(coordinator, 1)
    disconnected.set()
    wait_for_rest(coordinator)


def test_a_disconnect_while_the_coordinator_is_asked_returns_capacity(
    start_pair: StartPair, fake_engine: FakeEngine
) -> None:
    coordinator, worker = start_pair()
    blocked, go_on = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        assert go_on.wait(30)

    fake_engine.pause()
    loop_of(coordinator).call_soon_threadsafe(block)
    assert blocked.wait(30)
    with worker.connect() as embedding, worker.connect() as completion:
        embedding.sendall(_post(EMBEDDINGS, model="tiny", input=["a", "b"]))
        completion.sendall(_post(COMPLETIONS))
        time.sleep(0.3)  # the worker has asked
    time.sleep(0.3)  # and has noticed that nobody waits
    go_on.set()
    wait_until(lambda: coordinator.metric("http_requests_total", handler=EMBEDDINGS, method="POST", status="499"), 30)
    wait_for_rest(coordinator)
    fake_engine.resume()
    assert send(worker).status_code == 200


@Kind
def test_a_stop_string_ends_a_choice_for_the_coordinator(
    start_pair: StartPair, fake_engine: FakeEngine, start: Start, stream: bool
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.005
    coordinator, worker = start_pair()
    response = send(worker, n=2, stop="world", max_tokens=ENDLESS, stream=stream)
    assert response.status_code == 200
    chunks = parse_events(response.text) if stream else [response.json()]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["stop", "stop"]
    wait_for_rest(coordinator)
    assert fake_engine.num_choices == 0
    assert coordinator.metric("lightwell_request_success_total", finished_reason="stop") == 2
    assert coordinator.metric("lightwell_request_success_total", finished_reason="abort") == 0


def _post(path: str, **fields: Any) -> bytes:
    body = json.dumps(MINIMAL.get(path, {}) | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def loop_of(server: RunningServer) -> Any:
    """Return the event loop of a server."""
    watcher = server.model.client._watcher
    assert watcher is not None
    return watcher.get_loop()
