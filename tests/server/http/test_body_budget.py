"""The limit on the bytes of all bodies, as a state machine and over many real connections."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import httpx
import openai
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.http.body_budget import FREE_BYTES, BodyBudget, BodyShare
from server.http.errors import BuffersExceedMemoryError
from tests.server.conftest import StartServer
from tests.support.serving import RunningServer, check_envelope, raw_request, read_response, wait_until

pytestmark = pytest.mark.checklist("A17")

MAX_BYTES = 1 << 20
HEAD = {"content_type": "application/json"}


class Deadline:
    """Stands for an asyncio.Timeout, and records that it was reached."""

    def __init__(self) -> None:
        self.is_reached = False

    def expired(self) -> bool:
        return self.is_reached

    def reschedule(self, when: float) -> None:
        self.is_reached = True


class Bodies(RuleBasedStateMachine):
    """Bodies arrive, end and are released in any order."""

    receiving = Bundle("receiving")
    complete = Bundle("complete")

    def __init__(self) -> None:
        super().__init__()
        self.budget = BodyBudget(MAX_BYTES)
        self.contexts: dict[BodyShare, ExitStack] = {}
        self.deadlines: dict[BodyShare, Deadline] = {}
        self.order: list[BodyShare] = []  # of those that arrive and count

    @rule(target=receiving)
    def begin(self) -> BodyShare:
        context, deadline = ExitStack(), Deadline()
        share = context.enter_context(self.budget.receive(cast(asyncio.Timeout, deadline)))
        self.contexts[share], self.deadlines[share] = context, deadline
        return share

    @rule(share=receiving, num_bytes=st.integers(1, MAX_BYTES // 2))
    def add(self, share: BodyShare, num_bytes: int) -> None:
        if share.is_refused:
            with pytest.raises(BuffersExceedMemoryError):
                share.add(bytes(num_bytes))
            return
        if share.num_bytes <= FREE_BYTES < share.num_bytes + num_bytes:
            self.order.append(share)
        try:
            share.add(bytes(num_bytes))
        except BuffersExceedMemoryError:
            assert share.is_refused
        refused = [each for each in self.order if each.is_refused]
        assert refused == self.order[: len(refused)]  # the longest-waiting first
        assert all(self.deadlines[each].is_reached for each in refused)
        self.order = self.order[len(refused) :]

    @rule(target=complete, share=consumes(receiving))
    def end(self, share: BodyShare) -> BodyShare:
        self.contexts.pop(share).close()
        self.order = [each for each in self.order if each is not share]
        return share

    @rule(share=consumes(receiving))
    def fail(self, share: BodyShare) -> None:
        error = OSError()
        self.contexts.pop(share).__exit__(OSError, error, None)
        self.order = [each for each in self.order if each is not share]
        assert share.num_bytes == 0

    @rule(share=complete)
    def release(self, share: BodyShare) -> None:
        share.release()

    @invariant()
    def sums_agree_and_only_complete_bodies_exceed_the_limit(self) -> None:
        sizes = [share.num_bytes for share in self.deadlines if share.num_bytes > FREE_BYTES]
        assert self.budget.num_bytes == sum(sizes)
        assert self.budget.num_bytes <= MAX_BYTES or not self.order


TestBodies = Bodies.TestCase


@contextmanager
def unfinished(server: RunningServer, num_bytes: int) -> Iterator[socket.socket]:
    """A connection that has sent all of a large body but its last byte."""
    body = json.dumps({"prompt": "x" * num_bytes}).encode()
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/tokenize", body, **HEAD)[:-1])
        yield connection


def test_the_longest_waiting_bodies_are_refused_first(start_server: StartServer) -> None:
    server = start_server(max_buffered_bytes=MAX_BYTES)
    with ExitStack() as stack:
        connections = []
        for _ in range(10):
            connections.append(stack.enter_context(unfinished(server, 200_000)))
            time.sleep(0.05)
        for connection in connections[:5]:
            status, headers, body = read_response(connection)
            assert status == 503
            assert headers["connection"] == "close"
            assert headers["retry-after"] == "2"
            assert check_envelope(body)["code"] == "server_is_overloaded"
            assert connection.recv(1) == b""
        for connection in connections[5:]:
            connection.sendall(b"}")
            assert read_response(connection)[0] == 200


def test_no_body_may_be_larger_than_the_budget(start_server: StartServer) -> None:
    server = start_server(max_buffered_bytes=50_000)
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/tokenize", b" " * 50_001, **HEAD))
        assert read_response(connection)[0] == 413


@contextmanager
def large_request(server: RunningServer, num_bytes: int) -> Iterator[threading.Thread]:
    """A request whose response begins when the engine goes on."""
    server.engine.pause()
    body = {"model": "tiny", "prompt": "x", "padding": "x" * num_bytes}
    thread = threading.Thread(target=lambda: httpx.post(server.url + "/v1/completions", json=body, timeout=30))
    thread.start()
    try:
        yield thread
    finally:
        server.engine.resume()
        thread.join()


def test_a_complete_body_counts_until_its_response(start_server: StartServer) -> None:
    """Small requests pass meanwhile, large ones are refused."""
    server = start_server(max_buffered_bytes=MAX_BYTES)
    large = json.dumps({"tokens": [97] * 80_000}).encode()  # whose answer is much smaller
    headers = {"content-type": "application/json"}

    def detokenize(body: bytes) -> int:
        return httpx.post(server.url + "/detokenize", content=body, headers=headers).status_code

    with large_request(server, 900_000):
        wait_until(lambda: server.engine.num_choices == 1)
        assert detokenize(large) == 503
        assert detokenize(b'{"tokens": [97]}') == 200
    assert detokenize(large) == 200


def test_openais_client_retries(start_server: StartServer) -> None:
    """Its large request waits for another one, and then succeeds."""
    server = start_server(max_buffered_bytes=8 << 20)
    answers: list[str] = []

    def ask() -> None:
        padding = {"padding": "x" * 5_000_000}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client:
            completion = client.completions.create(model="tiny", prompt="x", extra_body=padding, timeout=30)
        answers.append(completion.choices[0].text)

    with large_request(server, 7_000_000):
        wait_until(lambda: server.engine.num_choices == 1)
        thread = threading.Thread(target=ask)
        thread.start()
        refused = {"handler": "none", "method": "POST", "status": "503"}
        wait_until(lambda: server.metric("http_requests_total", **refused) == 1)
    thread.join()
    assert answers == ["Hello, world!"]
