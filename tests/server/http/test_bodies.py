"""Limits on the size, time, encoding and memory of request bodies: over real sockets, and as a unit."""

import asyncio
import gzip
import json
import select
import socket
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import httpx
import pytest

from server.http.bodies import BODY_TIMEOUT, DISCARD_TIMEOUT, FREE_BYTES, BodyReader, BodyShare
from server.http.errors import BodyTooLargeError, BuffersExceedMemoryError
from server.shares import MemoryBudget
from tests.server.conftest import StartServer
from tests.support.clients import shared_server
from tests.support.serving import RunningServer, check_envelope, check_error, raw_request, read_response, wait_until

MAX_BYTES = 1 << 20
JSON_TYPE = {"content_type": "application/json"}
HEADERS = {"content-type": "application/json"}


@pytest.mark.checklist("A12")
def test_compressed_bodies_are_never_inflated(server: RunningServer) -> None:
    body = gzip.compress(b"0" * 10**7)
    for encoding in ("gzip", "deflate", "br", "gzip, identity"):
        headers = HEADERS | {"content-encoding": encoding}
        check_error(httpx.post(server.url + "/v1/completions", content=body, headers=headers), 415)


@pytest.mark.checklist("A12")
def test_only_json_is_taken(server: RunningServer) -> None:
    def post(content_type: str | None) -> httpx.Response:
        headers = {} if content_type is None else {"content-type": content_type}
        return httpx.post(server.url + "/v1/completions", content=b'{"prompt":"hi"}', headers=headers)

    for taken in ("application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"'):
        assert post(taken).status_code == 200, taken
    refused = "text/plain, application/x-www-form-urlencoded, multipart/form-data; boundary=x, application/jsonx, "
    refused += "application/json; charset=latin-1, application/json; charset=utf-16"
    for other in (None, *refused.split(", ")):
        check_error(post(other), 415)
    check_error(httpx.post(server.url + "/nope", content=b"x"), 404)  # where the type does not matter
    check_error(httpx.post(server.url + "/v1/models"), 405)


@pytest.fixture(scope="module")
def small(model_folder: Path) -> Iterator[RunningServer]:
    """A server for bodies of at most 2,000 bytes."""
    with shared_server(model_folder, settings={"max_body_size": 2000}) as server:
        yield server


@pytest.mark.checklist("A08")
def test_a_body_over_the_limit(small: RunningServer) -> None:
    def post(content: bytes | Iterator[bytes]) -> httpx.Response:
        return httpx.post(small.url + "/v1/completions", content=content, headers=HEADERS)

    assert post(json.dumps({"prompt": "x" * 1000}).encode()).status_code == 200
    for content in (b" " * 2001, iter([b" " * 1000] * 40)):
        response = post(content)
        assert check_error(response, 413)["code"] == "request_too_large"
        assert response.headers["connection"] == "close"


@pytest.mark.checklist("A08")
def test_an_endless_body_is_cut(small: RunningServer) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with small.connect() as connection:
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        chunks = iter(lambda: b"8000\r\n" + b" " * 0x8000 + b"\r\n", b"")
        with pytest.raises(ConnectionError):
            deque(map(connection.sendall, chunks))
    with small.connect() as connection:  # a client that waits for 100 Continue is refused at once
        connection.sendall(f"{head}expect: 100-continue\r\ncontent-length: 99999\r\n\r\n".encode())
        assert read_response(connection)[0] == 413  # which it gets without a part of the body


@pytest.mark.checklist("A11")
def test_a_body_that_does_not_come_is_408(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/v1/completions", content_length="100", **JSON_TYPE) + b"{")
        wait_until(lambda: server.num_requests == 1)
        server.turn(BODY_TIMEOUT - 1.0)
        assert server.num_requests == 1
        server.turn(1.1)
        status, headers, body = read_response(connection)
        assert (status, headers["connection"]) == (408, "close")
        check_envelope(body)
        assert connection.recv(1) == b""


@pytest.mark.checklist("A14")
def test_a_connection_lives_on_after_refusals(start_server: StartServer) -> None:
    server = start_server(api_key=("k",))
    with server.connect() as connection:
        for fields in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer k", "content_type": "text/plain"}):
            connection.sendall(raw_request("POST", "/v1/completions", b"x" * 200_000, **fields))
            assert read_response(connection)[0] in (401, 415)
        connection.sendall(raw_request("GET", "/v1/models", authorization="Bearer k"))
        assert read_response(connection)[0] == 200


# The limit on the bytes of all bodies.


@pytest.mark.checklist("A17")
def test_which_bodies_are_refused_and_what_counts() -> None:
    """Those that have counted longest, until the others fit; complete ones are not."""
    budget, third = MemoryBudget(MAX_BYTES), MAX_BYTES // 3
    deadlines: dict[BodyShare, Mock] = {}

    def begin(num_bytes: int) -> BodyShare:
        deadline = Mock(spec=asyncio.Timeout, **{"expired.return_value": False})
        deadlines[share := BodyShare(budget, deadline)] = deadline
        share.receive(bytes(num_bytes))
        return share

    complete = begin(third)
    del budget.shares[complete]  # as `BodyReader` does
    small, first, second = begin(FREE_BYTES), begin(third), begin(MAX_BYTES - 2 * third)
    assert budget.num_bytes == MAX_BYTES
    small.receive(b"x")  # now it counts
    assert [share.error is not None for share in (complete, small, first, second)] == [False, False, True, False]
    with pytest.raises(BuffersExceedMemoryError):
        first.receive(b"x")
    assert not first.chunks
    last = begin(2 * third - FREE_BYTES + 1)
    assert [share.error is not None for share in (complete, small, second, last)] == [False, True, True, False]
    assert [share for share, deadline in deadlines.items() if deadline.reschedule.called] == [small, first, second]
    assert budget.num_bytes == third + last.size
    for _ in range(2):
        complete.release()
    assert budget.num_bytes == last.size
    with pytest.raises(BuffersExceedMemoryError):
        last.receive(bytes(MAX_BYTES))  # alone


@pytest.mark.checklist("A17")
@pytest.mark.anyio
async def test_a_refused_body_leaves_memory_at_once() -> None:
    """Also while its error is kept, which refers to the frame that has received it."""
    first, rest = bytes(100), bytes(1000)
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in (first, rest)]
    num_references = sys.getrefcount(first)
    scope, receive = {"headers": [(b"expect", b"100-continue")]}, AsyncMock(side_effect=messages)
    with pytest.raises(BodyTooLargeError) as kept:
        await BodyReader(1000, MAX_BYTES).read(scope, receive)
    assert sys.getrefcount(first) == num_references, kept


@pytest.fixture(scope="module")
def limited(model_folder: Path) -> Iterator[RunningServer]:
    """A server that holds a MiB of bodies."""
    with shared_server(model_folder, settings={"max_buffered_bytes": MAX_BYTES}) as server:
        yield server
        server.reset()


@pytest.mark.checklist("A17")
def test_the_longest_waiting_bodies_are_refused_first(limited: RunningServer) -> None:
    body = json.dumps({"prompt": "x", "padding": "x" * 200_000}).encode()

    def has_answer(connection: socket.socket) -> bool:
        """Whether the server has waited for the rest of the body, and answered."""
        limited.turn(DISCARD_TIMEOUT)
        return bool(select.select([connection], [], [], 0)[0])

    with ExitStack() as stack:
        connections = []
        for number in range(10):
            connections.append(stack.enter_context(limited.connect()))
            connections[-1].sendall(raw_request("POST", "/v1/completions", body, **JSON_TYPE)[:-1])
            wait_until(lambda: limited.num_requests == min(number + 1, 5))  # noqa: B023
            if number >= 5:
                wait_until(lambda: has_answer(connections[number - 5]))  # noqa: B023
                status, headers, error = read_response(connections[number - 5])
                assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "2")
                assert check_envelope(error)["code"] == "server_is_overloaded"
                assert connections[number - 5].recv(1) == b""
        for connection in connections[5:]:
            connection.sendall(b"}")
            assert read_response(connection)[0] == 200


@pytest.mark.checklist("A17")
def test_a_complete_body_counts_until_its_response(limited: RunningServer) -> None:
    """Small requests pass meanwhile, large ones are refused. None may be larger than all together."""
    body = {"model": "tiny", "prompt": "x", "padding": "x" * 900_000}
    large = b'{"n": 0}'.ljust(300_000)  # whose mistake is seen without the engine

    def post(body: bytes) -> int:
        return httpx.post(limited.url + "/v1/completions", content=body, headers=HEADERS).status_code

    assert post(b" " * (MAX_BYTES + 1)) == 413
    limited.engine.pause()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(httpx.post, limited.url + "/v1/completions", json=body, timeout=60)
        wait_until(lambda: limited.engine.num_choices == 1)
        assert post(large) == 503
        assert post(large.strip()) == 400
        limited.engine.resume()
        assert first.result().status_code == 200
    assert post(large) == 400
