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
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, MINIMAL, parse_events
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_envelope, check_error, raw_request, wait_until
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
    wait_until(lambda: fake_engine.num_choices == 0)
    assert coordinator.metric("lightwell_request_success_total", finished_reason="stop") == 2
    assert coordinator.metric("lightwell_request_success_total", finished_reason="abort") == 0


def _post(path: str, **fields: Any) -> bytes:
    body = json.dumps(MINIMAL.get(path, {}) | fields).encode()
    return raw_request("POST", path, body, content_type="application/json", authorization=f"Bearer {KEYS[0]}")


def loop_of(server: RunningServer) -> Any:
    """Return the event loop of a server."""
    watcher = server.model.client._watcher
    assert watcher is not None
    return watcher.get_loop()


ANSWERED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": ["Hi", "Ho"], "n": 2, "logprobs": 2, "echo": True},
    CHAT: {"messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": "wor"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "Hi", "stream": False},
    "/api/embed": {"input": ["Hi", "Ho"]},
    EMBEDDINGS: {"input": [f"text {number}" for number in range(30)]},
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b", "c"]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
    f"{COMPLETIONS}/render": {"prompt": "Hi"},
    f"{CHAT}/render": {"messages": MESSAGES},
}
CHANGING = {
    "id",
    "request_id",
    "created",
    "created_at",
    "total_duration",
    "load_duration",
    "prompt_eval_duration",
    "eval_duration",
}


def without_times(value: Any) -> Any:
    """Return a JSON value without ids and times."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: without_times(item) for name, item in value.items() if name not in CHANGING}


@pytest.mark.parametrize("path", ANSWERED)
def test_answers_are_those_of_the_coordinator(start_pair: StartPair, fake_engine: FakeEngine, path: str) -> None:
    fake_engine.config.max_num_seqs = 3
    pair = start_pair(max_queued_requests=1)
    for stream in (False, True):
        fields = {"model": "tiny", "seed": 7, **ANSWERED[path]} | ({"stream": True} if stream else {})
        first, second = (send(server, path, **fields) for server in pair)
        assert first.status_code == second.status_code
        assert first.headers["content-type"] == second.headers["content-type"]
        assert {*first.headers} == {*second.headers}
        if first.headers["content-type"] == "application/json":
            assert without_times(first.json()) == without_times(second.json())
        else:
            assert _text(first) == _text(second)
        wait_for_rest(pair[0])


def _text(stream: httpx.Response) -> str:
    """Return the text of a stream's events, choice by choice: how many come in an event depends on time."""
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if "{" in line]
    parts = [part for event in events for part in _parts(json.loads(event))]
    return "".join(text for _, text in sorted(parts, key=lambda part: part[0]))


def _parts(value: Any, index: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the texts in a JSON value, with the index of their choice."""
    if isinstance(value, list):
        for item in value:
            yield from _parts(item, index)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name in ("text", "content", "response", "finish_reason", "stop_reason") and isinstance(item, str):
                yield value.get("index", index), item
            else:
                yield from _parts(item, value.get("index", index))


def test_more_prompts_than_the_capacity(start_pair: StartPair, fake_engine: FakeEngine, start: Start) -> None:
    """They are sent as capacity becomes free, of which other requests get some."""
    fake_engine.config.max_num_seqs, fake_engine.config.step_seconds = 2, 0.005
    coordinator, worker = start_pair(max_queued_requests=3)
    texts = [f"text {number}" for number in range(40)]
    answers = [start(server, EMBEDDINGS, model="tiny", input=texts) for server in (worker, coordinator)]
    wait_until(lambda: len({submit.ids for submit in fake_engine.submits}) == 2, 30)
    others = [start(server, max_tokens=3, queue_timeout=60) for server in (worker, coordinator)]
    embeddings = [[item["embedding"] for item in answer.result().json()["data"]] for answer in answers]
    assert embeddings[0] == embeddings[1]
    assert len({tuple(embedding) for embedding in embeddings[0]}) > 5
    assert {answer.result().status_code for answer in others} <= {200, 429}
    wait_for_rest(coordinator)


def test_a_disconnect_while_more_capacity_is_awaited(start_pair: StartPair, fake_engine: FakeEngine) -> None:
    fake_engine.config.max_num_seqs, fake_engine.config.step_seconds = 1, 0.05
    coordinator, worker = start_pair(max_queued_requests=0)
    with worker.connect() as connection:
        connection.sendall(_post(EMBEDDINGS, model="tiny", input=[f"text {number}" for number in range(500)]))
        wait_until(lambda: len(fake_engine.submits) > 3, 30)
    wait_for_rest(coordinator)
    assert len(fake_engine.submits) < 100
    assert send(worker).status_code == 200


def test_metrics_count_the_requests_of_both(start_pair: StartPair) -> None:
    pair = start_pair()
    coordinator, _ = pair
    for server in pair:
        for _ in range(2):
            assert send(server, foo=1).status_code == 200
        assert send(server, CHAT, stop="wor", stream=True).status_code == 200
        assert send(server, "/none").status_code == 404
        assert send(server, n=99_999).status_code == 400
        headers = {"x-stainless-retry-count": "1"}
        assert httpx.post(server.url + COMPLETIONS, json=MINIMAL[COMPLETIONS], headers=headers).status_code == 200
    expected = {
        ("http_requests_total", "handler", COMPLETIONS, "method", "POST", "status", "200"): 6,
        ("http_requests_total", "handler", COMPLETIONS, "method", "POST", "status", "400"): 2,
        ("http_requests_total", "handler", CHAT, "method", "POST", "status", "200"): 2,
        ("http_requests_total", "handler", "none", "method", "POST", "status", "404"): 2,
        ("lightwell_request_success_total", "finished_reason", "stop"): 8,
        ("lightwell_tokenizer_seconds_count",): 8,
        ("lightwell_detokenizer_seconds_count",): 8,
        ("lightwell_e2e_request_latency_seconds_count",): 8,
        ("lightwell_unknown_parameters_total",): 4,
        ("lightwell_retried_requests_total",): 2,
        ("lightwell_prompt_tokens_total",): 6 * 2 + 2 * len(coordinator.engine.submits[2].prompt_token_ids),
        ("lightwell_requests_rejected_total", "reason", "too_many_choices"): 0,
    }
    for (name, *labels), value in expected.items():
        by_name = dict(zip(labels[::2], labels[1::2], strict=True))
        wait_until(lambda: coordinator.metric(name, **by_name) == value, 5)  # noqa: B023
    pages = [
        {line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if "process_" not in line}
        for server in pair
    ]
    changed = {line for line in pages[0] ^ pages[1] if "metrics" not in line}
    assert not changed


def test_many_requests_at_once(start_pair: StartPair, fake_engine: FakeEngine, start: Start) -> None:
    """Of several tenants, through both, whole and streamed; some are refused, some disconnect."""
    fake_engine.config.max_num_seqs, fake_engine.config.step_seconds = 3, 0.001
    pair = start_pair(max_queued_requests=4, api_key=KEYS)
    kinds: list[dict[str, Any]] = [{"stream": True}, {"n": 2}, {"stop": "wor", "stream": True}, {"prompt": ["a", "b"]}]
    answers = [
        start(server, key=key, queue_timeout=30, **kind)
        for _ in range(10)
        for key in KEYS
        for server in pair
        for kind in kinds
    ]
    for number in range(20):
        with pair[1].connect() as connection:
            connection.sendall(_post(COMPLETIONS, stream=number % 2 == 0))
    statuses = {answer.result().status_code for answer in answers}
    assert 200 in statuses
    assert statuses <= {200, 429}
    wait_for_rest(pair[0])
    wait_until(lambda: fake_engine.num_choices == 0)
    wait_until(lambda: not len(pair[1].context.running), 30)
