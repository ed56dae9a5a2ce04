"""The limit on the bytes of all bodies, as a state machine and over many real connections."""

import asyncio
import json
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import httpx
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.http.body_budget import FREE_BYTES, BodyBudget, BodyShare
from server.http.body_middleware import DISCARD_TIMEOUT
from server.http.errors import BuffersExceedMemoryError
from tests.support.clients import shared_server
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


@pytest.fixture(scope="module")
def small(model_folder: Path) -> Iterator[RunningServer]:
    """A server that holds a MiB of bodies."""
    with shared_server(model_folder, settings={"max_buffered_bytes": MAX_BYTES}) as server:
        yield server
        server.reset()


def test_the_longest_waiting_bodies_are_refused_first(small: RunningServer) -> None:
    body = json.dumps({"prompt": "x" * 200_000}).encode()

    def has_answer(connection: socket.socket) -> bool:
        """Whether the server has waited for the rest of the body, and answered."""
        small.turn(DISCARD_TIMEOUT)
        return bool(select.select([connection], [], [], 0)[0])

    with ExitStack() as stack:
        connections = []
        for number in range(10):
            connections.append(stack.enter_context(small.connect()))
            connections[-1].sendall(raw_request("POST", "/tokenize", body, **HEAD)[:-1])
            wait_until(lambda: small.num_requests == min(number + 1, 5))  # noqa: B023
            if number >= 5:
                wait_until(lambda: has_answer(connections[number - 5]))  # noqa: B023
                status, headers, error = read_response(connections[number - 5])
                assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "2")
                assert check_envelope(error)["code"] == "server_is_overloaded"
                assert connections[number - 5].recv(1) == b""
        for connection in connections[5:]:
            connection.sendall(b"}")
            assert read_response(connection)[0] == 200


def test_no_body_may_be_larger_than_the_budget(small: RunningServer) -> None:
    with small.connect() as connection:
        connection.sendall(raw_request("POST", "/tokenize", b" " * (MAX_BYTES + 1), **HEAD))
        assert read_response(connection)[0] == 413


def test_a_complete_body_counts_until_its_response(small: RunningServer) -> None:
    """Small requests pass meanwhile, large ones are refused."""
    body = {"model": "tiny", "prompt": "x", "padding": "x" * 900_000}
    large = json.dumps({"tokens": [97] * 80_000}).encode()  # whose answer is much smaller

    def detokenize(body: bytes) -> int:
        headers = {"content-type": "application/json"}
        return httpx.post(small.url + "/detokenize", content=body, headers=headers).status_code

    small.engine.pause()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(httpx.post, small.url + "/v1/completions", json=body, timeout=60)
        wait_until(lambda: small.engine.num_choices == 1)
        assert detokenize(large) == 503
        assert detokenize(b'{"tokens": [97]}') == 200
        small.engine.resume()
        assert first.result().status_code == 200
    assert detokenize(large) == 200
