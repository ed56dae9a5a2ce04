"""Requests through a worker and the coordinator: one capacity, the same limits and answers, and what they share."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pytest
import zmq

from engine.shared.messages import HEARTBEAT_SECONDS, Abort, SamplingParams, Submit
from server.generation import job as jobs
from server.generation.pipeline import MAX_HELD_SECONDS
from server.http.errors import ServerError
from server.parts.inspection.part import StepReaders
from server.parts.recordings.part import Recordings
from server.parts.workers import messages
from server.parts.workers.relay import Relay
from server.parts.workers.worker import Coordinator, HeldReservation, WorkerClient
from server.tenants import ANYBODY
from tests.server.parts.conftest import StartPair
from tests.server.parts.workers.conftest import QUEUE_TIMEOUT, REQUEST_TIMEOUT
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, MINIMAL, ask, ask_json, parse_events, write_adapter
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, MortalEngine
from tests.support.serving import RunningServer, check_envelope, check_error, own_address, raw_request, wait_until
from tests.support.workers import Pair, running_worker

EMBEDDINGS = "/v1/embeddings"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
KEYS = ("key-one", "key-two")
TOKENS = "lightwell_generation_tokens_total"

Start = Callable[..., "Future[httpx.Response]"]
Kind = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
Order = pytest.mark.parametrize("is_worker_first", [False, True], ids=["coordinator first", "worker first"])
Both = pytest.mark.parametrize(("is_worker_first", "stream"), [(False, True), (True, False)])


@pytest.fixture
def narrow(start_pair: StartPair, fake_engine: FakeEngine) -> Pair:
    """Servers of two keys, with capacity for two choices, whose engine is paused."""
    fake_engine.config.max_num_seqs = 1
    pair = start_pair(max_queued_requests=1, api_key=KEYS)
    fake_engine.pause()
    return pair


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
    wait_until(lambda: coordinator.model.client.num_in_flight == number)


def relay_of(coordinator: RunningServer) -> Relay:
    (relay,) = coordinator.context.workers
    assert isinstance(relay, Relay)
    return relay


def wait_for_rest(coordinator: RunningServer) -> None:
    """Wait until nothing is left of the requests of the worker, in the engine neither."""
    relay = relay_of(coordinator)
    held: tuple[dict[Any, Any], ...] = (relay._held, relay._uses, relay._streams, relay._admitted)
    wait_until(
        lambda: not any(held) and not coordinator.model.client.num_in_flight and not coordinator.engine.num_choices
    )


def check_end(response: httpx.Response, stream: bool) -> None:
    """Assert that a request has been answered to its end."""
    assert response.status_code == 200, response.text
    chunks = parse_events(response.text) if stream else [response.json()]
    assert [reason for chunk in chunks for reason in [chunk["choices"][0]["finish_reason"]] if reason] == ["stop"]


@Both
def test_there_is_one_capacity(narrow: Pair, start: Start, is_worker_first: bool, stream: bool) -> None:
    coordinator, _ = narrow
    first, second = ordered(narrow, is_worker_first)
    answers = [start(first, stream=stream)]
    wait_for_choices(coordinator, 1)
    answers.append(start(second, stream=stream))
    wait_for_choices(coordinator, 2)
    for server in narrow:
        for path in (COMPLETIONS, CHAT):
            response = send(server, path, stream=stream)
            assert check_error(response, 429)["code"] == "rate_limit_exceeded"
            assert int(response.headers["retry-after"]) >= 1
        assert check_error(send(server, n=3), 400)["param"] == "n"
    coordinator.engine.resume()
    for answer in answers:
        check_end(answer.result(), stream)
    wait_for_rest(coordinator)
    assert coordinator.metric("lightwell_requests_rejected_total", reason="queue_full") == 4


@Both
def test_a_waiting_request_makes_room_for_a_tenant_of_the_other_process(
    narrow: Pair, start: Start, is_worker_first: bool, stream: bool
) -> None:
    coordinator, _ = narrow
    first, second = ordered(narrow, is_worker_first)
    older = start(first, stream=stream)
    wait_for_choices(coordinator, 1)
    newer = start(first, stream=stream)
    wait_for_choices(coordinator, 2)
    other = start(second, key=KEYS[1], stream=stream)
    response = newer.result()
    assert check_error(response, 429)["code"] == "rate_limit_exceeded"
    assert int(response.headers["retry-after"]) >= 1
    coordinator.engine.resume()
    check_end(older.result(), stream)
    check_end(other.result(), stream)
    wait_for_rest(coordinator)
    assert coordinator.metric("lightwell_requests_rejected_total", reason="evicted") == 1


def is_answered(coordinator: RunningServer) -> bool:
    """Return whether a client has the HTTP status of a request that has not ended, in either process."""
    return any(each.is_answered for each in coordinator.model.client._shares.requests())


def has_begun(coordinator: RunningServer, num_tokens: float, stream: bool) -> bool:
    """Return whether there are more tokens, and the client of a stream has its status."""
    return coordinator.metric(TOKENS) > num_tokens and is_answered(coordinator) == stream


@Order
def test_a_request_with_a_status_makes_room_last(narrow: Pair, start: Start, is_worker_first: bool) -> None:
    coordinator, _ = narrow
    first, second = ordered(narrow, is_worker_first)
    without_status = start(first)
    wait_for_choices(coordinator, 1)
    with_status = start(first, stream=True)
    wait_for_choices(coordinator, 2)

    def has_status() -> bool:
        first.turn(MAX_HELD_SECONDS)
        return is_answered(coordinator)

    wait_until(has_status)
    other = start(second, key=KEYS[1])
    check_error(without_status.result(), 429)
    coordinator.engine.resume()
    check_end(with_status.result(), stream=True)
    check_end(other.result(), stream=False)
    wait_for_rest(coordinator)


@Kind
@pytest.mark.parametrize(
    ("timeout", "seconds", "fields"),
    [
        ("queue_timeout", QUEUE_TIMEOUT, {}),
        ("queue_timeout", 200, {"queue_timeout": 200}),
        ("request_timeout", REQUEST_TIMEOUT, {}),
    ],
)
def test_timeouts(pair: Pair, start: Start, timeout: str, seconds: int, fields: dict[str, Any], stream: bool) -> None:
    coordinator, _ = pair
    if timeout == "queue_timeout":
        coordinator.engine.pause()
    coordinator.engine.config.endless, coordinator.engine.config.step_seconds = True, 0.02
    responses = []
    for server in pair:
        num_tokens = coordinator.metric(TOKENS)
        answer = start(server, stream=stream, max_tokens=1000, **fields)
        wait_until(lambda: coordinator.engine.num_choices == 1)
        if timeout == "request_timeout":
            wait_until(partial(has_begun, coordinator, num_tokens, stream))
        coordinator.turn(seconds + 1)
        responses.append(answer.result())
        wait_for_rest(coordinator)
    if stream and timeout == "request_timeout":
        errors = [re.findall("^data: .+", response.text, re.MULTILINE)[-2:] for response in responses]
        assert errors[0] == errors[1]
        assert errors[0][1] == "data: [DONE]"
        assert check_envelope(errors[0][0].removeprefix("data: ").encode())["code"] == "request_timeout"
        assert [response.status_code for response in responses] == [200, 200]
    else:
        assert check_error(responses[0], 503) == check_error(responses[1], 503)
        assert {*responses[0].headers} == {*responses[1].headers}
    assert coordinator.metric("lightwell_requests_rejected_total", reason=timeout) == 2


@Kind
def test_a_disconnect_returns_capacity(pair: Pair, stream: bool) -> None:
    coordinator, worker = pair
    coordinator.engine.config.endless, coordinator.engine.config.step_seconds = True, 0.01
    with worker.connect() as connection:
        connection.sendall(_post(COMPLETIONS, n=2, max_tokens=1000, stream=stream))
        wait_for_choices(coordinator, 2)
        wait_until(lambda: coordinator.engine.num_choices == 2)
        if stream:
            assert connection.recv(100)
    wait_until(lambda: coordinator.engine.num_choices == 0)
    wait_for_rest(coordinator)
    assert coordinator.metric("lightwell_request_success_total", finished_reason="abort") == 2


def test_a_disconnect_while_tokenizing_returns_capacity(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, worker = pair
    disconnected, tokenize = threading.Event(), jobs._tokenize

    def slow(job: Any) -> Any:
        assert disconnected.wait(60)
        return tokenize(job)

    monkeypatch.setattr(jobs, "_tokenize", slow)
    coordinator.engine.pause()
    with worker.connect() as connection:
        connection.sendall(_post(COMPLETIONS))
        wait_for_choices(coordinator, 1)
    disconnected.set()
    wait_for_rest(coordinator)


def test_a_disconnect_while_the_coordinator_is_asked_returns_capacity(pair: Pair) -> None:
    coordinator, worker = pair
    blocked, go_on = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        assert go_on.wait(60)

    client = worker.model.client
    assert isinstance(client, WorkerClient)
    coordinator.engine.pause()
    coordinator.loop.call_soon_threadsafe(block)
    assert blocked.wait(60)
    with worker.connect() as embedding, worker.connect() as completion:
        embedding.sendall(_post(EMBEDDINGS, model="tiny", input=["a", "b"]))
        completion.sendall(_post(COMPLETIONS))
        wait_until(lambda: len(client._coordinator._replies) == 2)
    wait_until(lambda: not client._coordinator._replies)  # nobody waits any more
    go_on.set()
    wait_until(lambda: coordinator.metric("http_requests_total", handler=EMBEDDINGS, method="POST", status="499"))
    wait_for_rest(coordinator)
    coordinator.engine.resume()
    assert send(worker).status_code == 200


@Kind
def test_a_stop_string_ends_a_choice_for_the_coordinator(pair: Pair, stream: bool) -> None:
    coordinator, worker = pair
    coordinator.engine.config.endless, coordinator.engine.config.step_seconds = True, 0.005
    response = send(worker, n=2, stop="world", max_tokens=2000, stream=stream)
    assert response.status_code == 200
    chunks = parse_events(response.text) if stream else [response.json()]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["stop", "stop"]
    wait_for_rest(coordinator)
    wait_until(lambda: coordinator.engine.num_choices == 0)
    assert coordinator.metric("lightwell_request_success_total", finished_reason="stop") == 2
    assert coordinator.metric("lightwell_request_success_total", finished_reason="abort") == 0


def _post(path: str, **fields: Any) -> bytes:
    body = json.dumps(MINIMAL.get(path, {}) | fields).encode()
    return raw_request("POST", path, body, content_type="application/json", authorization=f"Bearer {KEYS[0]}")


ANSWERED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": ["Hi", "Ho"], "n": 2, "logprobs": 2, "echo": True},
    CHAT: {"messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": "wor"},
    **{path: {} for path in MINIMAL if path not in (COMPLETIONS, CHAT, "/v1/responses")},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/embed": {"input": ["Hi", "Ho"]},
    EMBEDDINGS: {"input": [f"text {number}" for number in range(30)]},
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b", "c"]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
    f"{COMPLETIONS}/render": {"prompt": "Hi"},
    f"{CHAT}/render": {"messages": MESSAGES},
}
# Fields that change if the answer is streamed.
STREAMED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi", "n": 1},
    CHAT: {"n": 1},
    "/v1/messages": {},
    "/api/chat": {},
}
CHANGING = re.compile("id|request_id|created|created_at|.*_duration")


def without_times(value: Any) -> Any:
    """Return a JSON value without ids and times."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: without_times(item) for name, item in value.items() if not CHANGING.fullmatch(name)}


@pytest.mark.parametrize("path", ANSWERED)
def test_answers_are_those_of_the_coordinator(pair: Pair, path: str) -> None:
    fields: dict[str, Any] = {"model": "tiny", "seed": 7} | ANSWERED[path]
    first, second = (send(server, path, **fields) for server in pair)
    assert first.status_code == second.status_code
    assert {*first.headers} == {*second.headers}
    assert without_times(first.json()) == without_times(second.json())
    if path in STREAMED:
        streams = [send(server, path, **fields | {"stream": True} | STREAMED[path]) for server in pair]
        assert streams[0].headers["content-type"] == streams[1].headers["content-type"]
        assert {*streams[0].headers} == {*streams[1].headers}
        # How many events there are depends on time.
        texts = ["".join(re.findall(r'"(?:text|content|response)":"(.*?)"', stream.text)) for stream in streams]
        assert texts[0] == texts[1]
        assert "Hello, " in texts[0]
    wait_for_rest(pair[0])


def test_more_prompts_than_the_capacity(start_pair: StartPair, fake_engine: FakeEngine, start: Start) -> None:
    """They are sent as capacity becomes free, of which other requests get some."""
    fake_engine.config.max_num_seqs, fake_engine.config.step_seconds = 2, 0.005
    coordinator, worker = start_pair(max_queued_requests=3)
    texts = [f"text {number}" for number in range(40)]
    answers = [start(server, EMBEDDINGS, model="tiny", input=texts) for server in (worker, coordinator)]
    wait_until(lambda: len({submit.ids for submit in fake_engine.submits}) == 2)
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
        wait_until(lambda: len(fake_engine.submits) > 3)
    wait_for_rest(coordinator)
    assert len(fake_engine.submits) < 100
    assert send(worker).status_code == 200


TIMES = "process_|lora_requests_info"  # metrics that change by themselves


def test_metrics_count_the_requests_of_both(pair: Pair) -> None:
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
        wait_until(lambda: coordinator.metric(name, **by_name) == value)  # noqa: B023
    pages = [
        {line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if not re.search(TIMES, line)}
        for server in pair
    ]
    assert not {line for line in pages[0] ^ pages[1] if "metrics" not in line}


# Ids, recordings, adapters, and the state of the engine.


@Order
def test_a_request_is_cancelled_through_the_other_process(
    start_pair: StartPair, fake_engine: FakeEngine, is_worker_first: bool
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    pair = start_pair(api_key=KEYS)
    runner, other = ordered(pair, is_worker_first)
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "mine"}
    body = MINIMAL[COMPLETIONS] | {"max_tokens": 1500, "stream": True}
    with httpx.stream("POST", runner.url + COMPLETIONS, json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        for server in pair:
            ids = ("mine", first["id"], "none")
            errors = [check_error(send(server, f"/v1/requests/{id}/cancel", KEYS[1]), 404) for id in ids]
            texts = {error["message"].replace(id, "") for id, error in zip(ids, errors, strict=True)}
            assert len(texts) == 1  # those of another tenant are not told from those that never were
        assert send(other, f"/v1/requests/{first['id']}/cancel").status_code == 200
        assert '"finish_reason":"abort"' in "\n".join(lines)
    wait_until(lambda: not len(runner.context.running))
    for server in pair:
        check_error(send(server, "/v1/requests/mine/cancel"), 404)
    wait_until(lambda: fake_engine.num_choices == 0)


def test_requests_with_the_same_id_are_cancelled_in_both(pair: Pair, start: Start) -> None:
    pair[0].engine.pause()
    answers = [start(server, request_id="mine") for server in pair]
    wait_until(lambda: all(len(server.context.running) for server in pair))
    assert send(pair[1], "/v1/requests/mine/cancel").status_code == 200
    assert [answer.result().json()["choices"][0]["finish_reason"] for answer in answers] == ["abort", "abort"]


def test_a_worker_that_has_not_started_delays_no_cancel(
    start_pair: StartPair, fake_engine: FakeEngine, address: str, start: Start
) -> None:
    coordinator, _ = start_pair()
    fake_engine.pause()
    relay = Relay(f"{address}-other", coordinator.context, coordinator.app)
    asyncio.run_coroutine_threadsafe(relay.start(), coordinator.loop).result()
    coordinator.context.workers.append(relay)
    start(coordinator, request_id="mine")
    wait_until(lambda: len(coordinator.context.running))
    assert send(coordinator, "/v1/requests/mine/cancel").status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_the_worker_is_replayed(
    start_pair: StartPair, fake_engine: FakeEngine, path: str, stream: bool
) -> None:
    pair = start_pair(record_requests=3, api_key=KEYS)
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "mine"}
    body = MINIMAL[path] | {"n": 2, "max_tokens": 5, "stream": stream}
    answer = httpx.post(pair[1].url + path, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert 'logprobs":{' not in answer.text
    wait_until(lambda: len(pair[0].context.part(Recordings)) == 1)
    for server in pair:
        check_error(send(server, "/v1/requests/mine/replay", KEYS[1]), 404)
        replay = send(server, "/v1/requests/mine/replay").json()
        assert [(choice["num_tokens"], choice["bit_equal"]) for choice in replay["choices"]] == [(5, True)] * 2
    fake_engine.config.reply = list(b"HelLo")
    difference = send(pair[1], "/v1/requests/mine/replay").json()["choices"][1]["difference"]
    assert (difference["recorded"]["token"], difference["replayed"]["token"]) == ("l", "L")
    assert len(difference["recorded"]["top"]) == len(difference["replayed"]["top"])


@Order
def test_an_adapter_is_loaded_replaced_and_unloaded_for_both(pair: Pair, tmp_path: Path, is_worker_first: bool) -> None:
    pair[0].engine.config.max_loras = 1
    first, second = ordered(pair, is_worker_first)
    used: list[str] = []
    for number in range(3):
        folder = str(write_adapter(tmp_path / str(number)))
        assert send(first, LOAD, lora_name="sql", lora_path=folder, load_inplace=number > 0).status_code == 200
        wait_until(lambda: pair[0].model.client.adapters == pair[1].model.client.adapters)  # the worker is told
        for server in (second, first):
            assert ask_json(server.url, COMPLETIONS, model="sql")["model"] == "sql"
        used += {submit.lora_fingerprint for submit in pair[0].engine.submits[-2:]}
        assert used[-1] == pair[0].model.client.adapters["sql"].fingerprint
    assert len(set(used)) == len(used) == 3
    assert send(first, UNLOAD, lora_name="sql").status_code == 200
    wait_until(lambda: not pair[1].model.client.adapters)
    for server in (second, first):
        assert check_error(ask(server.url, COMPLETIONS, model="sql"), 404)["code"] == "model_not_found"


def test_an_engine_that_becomes_ready_later(address: str, model_folder: Path) -> None:
    with (
        FakeEngine(FakeEngineConfig(address=address, never_ready=True)) as engine,
        running_worker(engine, model_folder, server={"wait_ready": False}) as pair,
    ):
        first, second = (ask(server.url, COMPLETIONS) for server in pair)
        assert check_error(first, 503) == check_error(second, 503)
        assert "loaded" in first.text
        assert {*first.headers} == {*second.headers}
        first, second = (httpx.get(f"{server.url}/health") for server in pair)
        assert (first.status_code, first.content) == (second.status_code, second.content)
        engine.config.never_ready = False
        for server in pair:
            wait_until(lambda server=server: server.model.client.is_ready)
            assert ask(server.url, COMPLETIONS).status_code == 200


def test_a_second_engine_that_becomes_ready_later(model_folder: Path) -> None:
    with own_address() as first, own_address() as second:
        config = FakeEngineConfig(address=second, max_model_len=100, never_ready=True)
        with (
            FakeEngine(FakeEngineConfig(address=first)) as engine,
            FakeEngine(config) as other,
            running_worker(engine, model_folder, more_engines=[other]) as pair,
        ):
            config.never_ready = False
            wait_until(lambda: pair[0].model.client.max_num_seqs == 16)
            pair[0].turn(HEARTBEAT_SECONDS)
            for server in pair:
                wait_until(lambda server=server: server.model.client.max_num_seqs == 16)
                assert server.model.max_model_len == 100
                error = check_error(ask(server.url, COMPLETIONS, prompt="x" * 200), 400)
                assert error["code"] == "context_length_exceeded"
            assert not engine.submits
            assert not other.submits
            assert ask(pair[1].url, COMPLETIONS).status_code == 200


def test_an_engine_that_cannot_load(address: str, model_folder: Path) -> None:
    with (
        FakeEngine(FakeEngineConfig(address=address, load_failure="no memory")) as engine,
        running_worker(engine, model_folder, server={"wait_ready": False}) as (coordinator, worker),
    ):
        wait_until(lambda: worker.model.client.dead_reason is not None)
        assert worker.model.client.dead_reason == coordinator.model.client.dead_reason == "no memory"


def test_while_the_coordinator_drains(start_pair: StartPair, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    pair = start_pair()
    coordinator, worker = pair
    body = MINIMAL[COMPLETIONS] | {"max_tokens": 100, "stream": True}
    with httpx.stream("POST", worker.url + COMPLETIONS, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        coordinator.loop.call_soon_threadsafe(coordinator.model.client.drain)
        wait_until(coordinator.model.client.drain_requested.is_set)
        first, second = (ask(server.url, COMPLETIONS) for server in pair)
        assert check_error(first, 503) == check_error(second, 503)
        assert [response.headers["connection"] for response in (first, second)] == ["close", "close"]
        assert '"finish_reason":"length"' in "\n".join(lines)  # what runs is finished


@contextmanager
def mortal_engine(address: str, model_folder: Path, **options: Any) -> Iterator[tuple[MortalEngine, Pair]]:
    """Run servers in front of an engine that can be killed. It runs one choice at a time, slowly."""
    config = FakeEngineConfig(address=address, max_num_seqs=1, endless=True, step_seconds=0.01)
    with MortalEngine(config) as engine, running_worker(engine, model_folder, **options) as pair:
        yield engine, pair


def start_stream(stack: ExitStack, server: RunningServer) -> Iterator[str]:
    """Return the lines of a long stream that has begun."""
    body = MINIMAL[COMPLETIONS] | {"max_tokens": 1500, "stream": True}
    answer = stack.enter_context(httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60))
    assert answer.status_code == 200
    lines = answer.iter_lines()
    next(lines)
    return lines


def check_failed(lines: Iterator[str]) -> None:
    """Assert that a stream ends with an error event."""
    *_, error, done = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
    assert done == "[DONE]"
    assert "engine" in check_envelope(error.encode())["message"]


def test_the_engine_dies_for_good(address: str, model_folder: Path) -> None:
    with mortal_engine(address, model_folder) as (engine, pair), ExitStack() as stack:
        lines = start_stream(stack, pair[1])
        engine.kill()
        check_failed(lines)
        first, second = (ask(server.url, COMPLETIONS) for server in pair)
        assert check_error(first, 503) == check_error(second, 503)
        assert pair[0].model.client.num_in_flight == 0


def test_the_engine_is_restarted(address: str, model_folder: Path) -> None:
    with ExitStack() as stack:
        engine, pair = stack.enter_context(mortal_engine(address, model_folder, can_restart=True))
        coordinator, worker = pair
        lines = start_stream(stack, worker)
        threads = stack.enter_context(ThreadPoolExecutor())
        answers = [threads.submit(ask, worker.url, COMPLETIONS, stream=stream) for stream in (False, True)]
        wait_until(lambda: coordinator.model.client.num_in_flight == 3)
        engine.kill()
        check_failed(lines)
        wait_until(lambda: coordinator.model.client.restarting_since)
        coordinator.loop.call_soon_threadsafe(coordinator.model.client.engines[0].engine_started, engine.replace())
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert ask(worker.url, COMPLETIONS).status_code == 200
        assert coordinator.model.client.num_in_flight == 0


@pytest.fixture
def raw(address: str, start_pair: StartPair) -> Iterator[tuple[RunningServer, zmq.Socket[bytes]]]:
    """A coordinator, and a socket that speaks to a second relay of it as a worker does."""
    coordinator, _ = start_pair()
    relay = Relay(f"{address}-raw", coordinator.context, coordinator.app)
    asyncio.run_coroutine_threadsafe(relay.start(), coordinator.loop).result()
    coordinator.context.workers.append(relay)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.connect(f"{address}-raw")
        yield coordinator, socket


def receive(socket: "zmq.Socket[bytes]", kind: type) -> Any:
    """Return the next message of a kind."""
    while not isinstance(message := msgspec.msgpack.decode(socket.recv(), type=messages.FromCoordinator), kind):
        pass
    return message


def test_messages_that_cannot_be_used_harm_nothing(raw: tuple[RunningServer, "zmq.Socket[bytes]"]) -> None:
    coordinator, socket = raw
    encode = msgspec.msgpack.encode
    socket.send(encode(messages.Reserve(1, "", 1, "n", None)))
    assert receive(socket, messages.Reply) == messages.Reply(1)
    assert coordinator.model.client.num_in_flight == 1
    for content in (b"", b"\xc1", b"x" * 100, encode({"type": "Reserve"}), encode({"type": "Observe", "method": 3})):
        socket.send(content)
    unknown: list[Any] = [
        messages.Use(9, "x"),
        Submit(request_id="x", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), arrival=0.0),
        Abort("x"),
        Abort("x", 5),
        *(kind(9) for kind in (messages.Answered, messages.Release, messages.Leave)),
        *(kind(9) for kind in (messages.PartSent, messages.Forget)),
        messages.Refill(9, 9, 1),
        messages.Cancelled(9, True),
        messages.RequestPart(9, {}),
        messages.Observe("no_such_method", ()),
        messages.Observe("observe_tokenizer", ("x", "y", "z")),
    ]
    for message in unknown:
        socket.send(encode(message))
    socket.send(encode(messages.TakeNumber(2)))
    while (reply := receive(socket, messages.Reply)).number != 2:
        pass
    assert (reply.value, reply.error) == (0, None)
    socket.send(encode(messages.Release(1)))
    wait_until(lambda: coordinator.model.client.num_in_flight == 0)
    assert ask(coordinator.url, COMPLETIONS).status_code == 200


def test_a_relay_that_closes_ends_what_its_worker_had(raw: tuple[RunningServer, "zmq.Socket[bytes]"]) -> None:
    coordinator, socket = raw
    coordinator.engine.pause()
    encode = msgspec.msgpack.encode
    params = SamplingParams(max_tokens=5)
    for message in (
        messages.Reserve(2, "", 1, "n", None),
        messages.Reserve(1, "", 2, "n", None),
        messages.Use(1, "x"),
        Submit(request_id="x", prompt_token_ids=[1], params=params, arrival=0.0, n=2),
    ):
        socket.send(encode(message))
    wait_until(lambda: coordinator.engine.num_choices == 2)
    asyncio.run_coroutine_threadsafe(coordinator.context.workers.pop().close(), coordinator.loop).result(30)
    wait_until(lambda: coordinator.engine.num_choices == coordinator.model.client.num_in_flight == 0)


def test_what_the_worker_cannot_read_harms_nothing_else(start_pair: StartPair) -> None:
    coordinator, worker = start_pair()
    relay = relay_of(coordinator)

    def send_raw() -> None:
        assert relay._connection._socket is not None
        for content in (b"\xc1", msgspec.msgpack.encode({"type": "Reply", "number": "x"})):
            relay._connection._socket.send(content)
        error = messages.ErrorFields.of(ServerError())
        relay._send(messages.Refused(999, error))
        relay._send(messages.Failed("x", error))
        relay._send(messages.ResponsePart(999, {}))
        for kind in (messages.Reply, messages.ResponseEnd, messages.NextPart):
            relay._send(kind(999))

    with httpx.stream("GET", f"{worker.url}/lightwell/v1/events", timeout=60) as events:
        assert events.status_code == 200
        coordinator.loop.call_soon_threadsafe(send_raw)
        for _ in range(3):
            assert ask(worker.url, COMPLETIONS).status_code == 200
            assert httpx.get(f"{worker.url}/v1/models").status_code == 200
        assert coordinator.context.part(StepReaders).total() == 1


def test_the_coordinator_holds_a_failed_reservation_until_its_request_ends() -> None:
    """A `Refill` of a reservation that it no longer knows would never be answered."""
    sent: list[object] = []
    held = HeldReservation(7, ANYBODY, cast("Coordinator", SimpleNamespace(reservations={}, send=sent.append)))
    held.add(2)
    held.fail(ServerError())
    assert (held.num_choices, sent) == (0, [])
    held.release()
    assert sent == [messages.Release(7)]
