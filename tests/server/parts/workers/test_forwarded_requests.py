"""Requests that a worker forwards: the answers are those of the coordinator, and no more than a part is on its way."""

import asyncio
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engine_client.liveness import CHECK_SECONDS
from server.parts.inspection.part import StepReaders
from server.parts.workers import messages
from server.parts.workers.forwarded_requests import ForwardedRequests, Forwarder
from server.parts.workers.relay import worker_paths
from tests.server.parts.conftest import StartPair
from tests.support.clients import MINIMAL
from tests.support.fake_engine import FakeEngine
from tests.support.serving import check_envelope, check_error, raw_request, read_response, wait_until
from tests.support.workers import Pair, running_worker

RESPONSES = "/v1/responses"
CHANGING = {"date", "x-request-id", "request-id"}  # headers


def comparable(response: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    headers = [item for item in response.headers.multi_items() if item[0] not in CHANGING]
    return response.status_code, headers, response.content


PATHS = {
    "GET": "/ /health /healthz /readyz /docs /openapi.json /v1/models /v1/models/tiny /v1/models/org%2Ftiny?x=%20 "
    "/v1/models/none /tokenizer_info /api/tags /api/version /none /a%2Fb%00 /v1/completions /v1/responses/none "
    "/lightwell/v1/engine",
    "HEAD": "/ /health /v1/models",
    "OPTIONS": "/v1/completions",
    "DELETE": "/v1/completions",
    "PUT": "/v1/models",
    "POST": "/v1/models /none /v1/completion /v1/responses /v1/requests/none/cancel",
}


@pytest.mark.parametrize("method", PATHS)
def test_answers_are_those_of_the_coordinator(pair: Pair, method: str) -> None:
    headers = {"origin": "http://localhost:1", "access-control-request-method": "POST"}
    for path in PATHS[method].split():
        first, second = (httpx.request(method, server.url + path, headers=headers, timeout=60) for server in pair)
        if path == "/lightwell/v1/engine":  # has ages in it
            assert (first.status_code, {*first.json()}) == (second.status_code, {*second.json()})
        else:
            assert comparable(first) == comparable(second), path
        assert ("x-request-id" in first.headers) == ("x-request-id" in second.headers), path


def test_bodies_of_several_megabytes(pair: Pair) -> None:
    coordinator, worker = pair
    text = "a" * (5 << 20)
    first, second = (httpx.post(server.url + RESPONSES, json={"model": "tiny", "input": text}) for server in pair)
    assert comparable(first) == comparable(second)
    assert check_error(second, 400)["code"] == "context_length_exceeded"
    metadata = {f"key{number}": "x" * 400 for number in range(16)}
    made = httpx.post(worker.url + RESPONSES, json={"model": "tiny", "input": "Hi", "metadata": metadata}).json()
    assert httpx.get(f"{coordinator.url}{RESPONSES}/{made['id']}").json()["metadata"] == metadata
    parts = (
        json.dumps({"model": "tiny", "input": text}).encode()[start : start + 50_000]
        for start in range(0, 6 << 20, 50_000)
    )
    chunked = httpx.post(worker.url + RESPONSES, content=parts, headers={"content-type": "application/json"})
    assert check_error(chunked, 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit(start_pair: StartPair, is_chunked: bool) -> None:
    pair = start_pair(max_body_size=1 << 20)
    body = b'{"input": "' + b"a" * (3 << 20) + b'"}'
    answers = [
        httpx.post(server.url + RESPONSES, content=iter([body]) if is_chunked else body, timeout=60) for server in pair
    ]
    assert comparable(answers[0]) == comparable(answers[1])
    check_error(answers[1], 413)
    assert answers[1].headers["connection"] == "close"


def test_a_client_that_waits_for_100_continue(pair: Pair) -> None:
    _, worker = pair
    body = json.dumps({"model": "tiny", "input": "Hi"}).encode()
    request = raw_request("POST", RESPONSES, body, expect="100-continue", content_type="application/json")
    with worker.connect() as connection:
        connection.sendall(request[: -len(body)])
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_response(connection)[0] == 200


def test_a_streamed_response(pair: Pair) -> None:
    events: list[list[str]] = []
    for server in pair:
        body = {"model": "tiny", "input": "Hi", "stream": True}
        with httpx.stream("POST", server.url + RESPONSES, json=body, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            names = [line for line in answer.iter_lines() if line.startswith("event: ")]
            events.append([name for name, _ in itertools.groupby(names)])  # how many deltas there are depends on time
    assert events[0] == events[1]
    assert events[1][-1] == "event: response.completed"


def test_a_response_is_the_same_through_both(pair: Pair) -> None:
    coordinator, worker = pair
    made = httpx.post(worker.url + RESPONSES, json={"model": "tiny", "input": "Hi"}).json()
    for server in pair:
        assert httpx.get(f"{server.url}{RESPONSES}/{made['id']}").json() == made
    body = {"model": "tiny", "input": "Ho", "previous_response_id": made["id"]}
    assert httpx.post(coordinator.url + RESPONSES, json=body).status_code == 200
    assert httpx.delete(f"{worker.url}{RESPONSES}/{made['id']}").status_code == 200
    check_error(httpx.get(f"{coordinator.url}{RESPONSES}/{made['id']}"), 404)


def test_a_disconnect_ends_a_forwarded_generation(pair: Pair) -> None:
    coordinator, worker = pair
    engine = coordinator.engine
    engine.config.endless, engine.config.step_seconds = True, 0.01
    for stream in (False, True):
        body = json.dumps({"model": "tiny", "input": "Hi", "stream": stream, "store": False}).encode()
        with worker.connect() as connection:
            connection.sendall(raw_request("POST", RESPONSES, body, content_type="application/json"))
            wait_until(lambda: engine.num_choices == 1)
        wait_until(lambda: engine.num_choices == coordinator.model.client.num_in_flight == 0)


def test_a_stream_of_steps_ends_with_its_client(pair: Pair) -> None:
    coordinator, worker = pair
    readers = coordinator.context.part(StepReaders)
    for _ in range(3):
        with httpx.stream("GET", f"{worker.url}/lightwell/v1/events", timeout=60) as answer:
            assert answer.status_code == 200
            assert readers.total() == 1
        wait_until(lambda: not readers.total())
    assert not worker.context.part(StepReaders)


@pytest.mark.parametrize("path", ["/v1/completions", RESPONSES])
def test_the_address_of_the_client(start_pair: StartPair, caplog: pytest.LogCaptureFixture, path: str) -> None:
    pair = start_pair(forwarded_allow_ips=("127.0.0.1",))
    body = {"model": "tiny", "input" if path == RESPONSES else "prompt": "Hi"}
    with caplog.at_level(logging.INFO, "server.access"):
        for server in pair:
            headers = {"x-forwarded-for": "203.0.113.7", "x-request-id": f"id-{server.port}"}
            assert httpx.post(server.url + path, json=body, headers=headers).status_code == 200
        wait_until(lambda: len([record for record in caplog.records if record.name == "server.access"]) == 2)
    fields = [record.__dict__["fields"] for record in caplog.records if record.name == "server.access"]
    assert [each["client"] for each in fields] == ["203.0.113.7"] * 2
    assert [each["request_id"] for each in fields] == [f"id-{server.port}" for server in pair]
    assert [submit.tenant for submit in pair[0].engine.submits] == ["203.0.113.7"] * 2


@pytest.mark.parametrize("root_path", ["/llm", "/v1"])
def test_a_root_path(start_pair: StartPair, root_path: str) -> None:
    pair = start_pair(root_path=root_path)
    for path in ("/v1/models", "/api/tags", "/", "", "/none", "/v1/v1/models"):
        for prefix in ("", root_path):
            first, second = (httpx.get(server.url + prefix + path) for server in pair)
            assert comparable(first) == comparable(second), prefix + path
    assert httpx.get(f"{pair[1].url}{root_path}/v1/models").status_code == 200
    assert httpx.post(f"{pair[1].url}{root_path}/tokenize", json={"prompt": "Hi"}).status_code == 200


def test_keys_are_checked(start_pair: StartPair) -> None:
    pair = start_pair(api_key=("secret",))
    for path in ("/v1/models", "/metrics", "/v1/usage", "/none", "/"):
        for headers in ({}, {"authorization": "Bearer none"}, {"authorization": "Bearer secret"}):
            first, second = (httpx.get(server.url + path, headers=headers) for server in pair)
            if path == "/metrics" and second.status_code == 200:
                continue
            assert comparable(first) == comparable(second)
    assert httpx.get(f"{pair[1].url}/v1/models").status_code == 401


def test_a_coordinator_that_is_silent(fake_engine: FakeEngine, model_folder: Path) -> None:
    """What waits for it ends with an error, and so does what comes later."""
    with running_worker(fake_engine, model_folder, step_timeout=2.0) as (coordinator, worker):
        (relay,) = coordinator.context.workers
        body = json.dumps(MINIMAL["/v1/completions"]).encode()
        completion = raw_request("POST", "/v1/completions", body, content_type="application/json")
        fake_engine.pause()
        with worker.connect() as events, worker.connect() as waiting, worker.connect() as question:
            events.sendall(raw_request("GET", "/lightwell/v1/events"))
            assert events.recv(15) == b"HTTP/1.1 200 OK"
            waiting.sendall(completion)
            wait_until(lambda: coordinator.model.client.num_in_flight == 1)
            asyncio.run_coroutine_threadsafe(relay.close(), coordinator.loop).result(60)
            question.sendall(completion)
            for connection in (events, waiting, question):
                connection.settimeout(60)

            def is_dead() -> bool:
                worker.loop.turn(CHECK_SECONDS)
                return worker.model.client.dead_reason is not None

            wait_until(is_dead)
            assert [read_response(connection)[0] for connection in (waiting, question)] == [503, 503]
            while events.recv(65536):
                pass
        assert coordinator.model.client.num_in_flight == 0
        for path in ("/health", "/v1/models"):
            answer = httpx.get(worker.url + path, timeout=60)
            assert answer.status_code == 503
            check_envelope(answer.content)
        check_error(httpx.post(f"{worker.url}/v1/completions", json=MINIMAL["/v1/completions"]), 503)


# Both ends without sockets.


class Ends:
    """A forwarder and what answers its requests, as if connected. Each message is encoded and decoded."""

    def __init__(self, app: ASGIApp) -> None:
        self.sent: list[Any] = []  # by either end
        self.forwarded = ForwardedRequests(app, self._to_worker)
        self.forwarder = Forwarder(self._to_coordinator, itertools.count().__next__)

    def count(self, *kinds: type) -> int:
        return sum(isinstance(message, kinds) for message in self.sent)

    def _to_worker(self, message: Any) -> None:
        self.sent.append(message)
        copy: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=messages.FromCoordinator)
        asyncio.get_running_loop().call_soon(self.forwarder.on_message, copy)

    def _to_coordinator(self, message: Any) -> None:
        self.sent.append(message)
        copy: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=messages.FromWorker)
        asyncio.get_running_loop().call_soon(self.forwarded.on_message, copy)


SCOPE: Scope = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "https",
    "path": "/é",
    "raw_path": b"/%C3%A9",
    "query_string": b"a=b",
    "root_path": "",
    "headers": [(b"a", b"\xff"), (b"a", b"2")],
    "client": ("192.0.2.1", 5),
    "server": ("/run/socket", None),
}
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}


def body_part(content: bytes, more_body: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more_body}


async def settle() -> None:
    """Let all tasks run until they wait."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.anyio
async def test_one_part_is_on_its_way_in_each_direction() -> None:
    """A client that reads slowly slows the application down, which slows the client's request down."""
    read: list[bytes] = []
    taken: list[Message] = []
    room = asyncio.Semaphore(0)

    async def receive() -> Message:
        read.append(b"%d" % len(read))
        return {"type": "http.request", "body": read[-1], "more_body": len(read) < 20}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert {**scope, "asgi": None, "state": None} == {**SCOPE, "asgi": None, "state": None}
        await send(START)
        more_body = True
        while more_body:
            part = await receive()
            more_body = part["more_body"]
            await send(body_part(part["body"]))
            await send(body_part(b"", more_body))

    async def slow_send(message: Message) -> None:
        await room.acquire()
        taken.append(message)

    ends = Ends(app)
    answer = asyncio.create_task(ends.forwarder(SCOPE, receive, slow_send))
    for number in range(1 + 2 * 20):
        await settle()
        assert (len(read), len(taken), ends.count(messages.ResponsePart)) == ((number + 1) // 2, number, number + 1)
        room.release()
    await answer
    assert [message.get("body") for message in taken] == [None, *(each for body in read for each in (body, b""))]
    assert ends.count(messages.NextPart) == 20
    await settle()
    assert (ends.forwarded._running, ends.forwarder._running) == ({}, {})


@pytest.mark.anyio
async def test_an_application_that_stops_waiting_loses_no_part() -> None:
    parts = asyncio.Queue[Message]()
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
        parts.put_nowait({"type": "http.request", "body": b"1", "more_body": True})
        bodies.append((await receive())["body"])
        parts.put_nowait({"type": "http.disconnect"})
        assert [(await receive())["type"] for _ in range(3)] == ["http.disconnect"] * 3
        await send(START)
        await send(body_part(b"", more_body=False))

    await Ends(app).forwarder(SCOPE, parts.get, lambda message: asyncio.sleep(0))
    assert bodies == [b"1"]


@pytest.mark.anyio
async def test_a_request_that_nobody_waits_for_ends() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        while (await receive())["type"] != "http.disconnect":
            pass
        for _ in range(3):
            await send(body_part(b"x"))  # goes nowhere

    ends = Ends(app)
    answer = asyncio.create_task(ends.forwarder(SCOPE, asyncio.Queue[Message]().get, lambda message: asyncio.sleep(0)))
    await settle()
    answer.cancel()
    await settle()
    assert ends.count(messages.ResponsePart) == 1
    assert (ends.forwarded._running, ends.forwarder._running) == ({}, {})


@pytest.mark.anyio
async def test_failures_end_the_request() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise ZeroDivisionError

    ends = Ends(app)
    with pytest.raises(RuntimeError, match="could not answer"):
        await ends.forwarder(SCOPE, asyncio.Queue[Message]().get, lambda message: asyncio.sleep(0))

    async def broken_send(message: Message) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await ends.forwarder(SCOPE, asyncio.Queue[Message]().get, broken_send)
    await settle()
    assert (ends.forwarded._running, ends.forwarder._running) == ({}, {})


def test_what_a_worker_answers_itself() -> None:
    assert worker_paths() >= {
        *("/v1/completions", "/v1/completions/render", "/v1/chat/completions", "/v1/chat/completions/render"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/rerank", "/v1/score"),
        *("/tokenize", "/detokenize", "/api/chat", "/api/generate", "/api/embed"),
    }
    assert not [path for path in worker_paths() if "{" in path or "responses" in path or "adapter" in path]
