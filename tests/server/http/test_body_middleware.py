"""Limits on the size, time and encoding of request bodies, over real sockets."""

import gzip
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.http.body_middleware import BODY_TIMEOUT
from tests.server.conftest import StartServer
from tests.support.clients import shared_server
from tests.support.serving import (
    RunningServer,
    check_envelope,
    check_error,
    raw_request,
    read_response,
    wait_until,
)

JSON_TYPE = {"content_type": "application/json"}


@pytest.mark.checklist("A12")
def test_compressed_bodies_are_never_inflated(server: RunningServer) -> None:
    body = gzip.compress(b"0" * 10**7)
    for encoding in ("gzip", "deflate", "br", "gzip, identity"):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        check_error(httpx.post(server.url + "/tokenize", content=body, headers=headers), 415)


@pytest.fixture(scope="module")
def small(model_folder: Path) -> Iterator[RunningServer]:
    """A server for bodies of at most 2,000 bytes."""
    with shared_server(model_folder, settings={"max_body_size": 2000}) as server:
        yield server


@pytest.mark.checklist("A08")
def test_a_body_over_the_limit(small: RunningServer) -> None:
    def post(content: bytes | Iterator[bytes]) -> httpx.Response:
        return httpx.post(small.url + "/tokenize", content=content, headers={"content-type": "application/json"})

    assert post(json.dumps({"prompt": "x" * 1000}).encode()).status_code == 200
    for content in (b" " * 2001, iter([b" " * 1000] * 40)):
        response = post(content)
        assert check_error(response, 413)["code"] == "request_too_large"
        assert response.headers["connection"] == "close"


@pytest.mark.checklist("A08")
def test_an_endless_body_is_cut(small: RunningServer) -> None:
    with small.connect() as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        chunks = iter(lambda: b"8000\r\n" + b" " * 0x8000 + b"\r\n", b"")
        with pytest.raises(ConnectionError):
            deque(map(connection.sendall, chunks))


def test_a_client_that_waits_for_100_continue_is_refused_at_once(small: RunningServer) -> None:
    with small.connect() as connection:
        fields = "host: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 99999"
        connection.sendall(f"POST /tokenize HTTP/1.1\r\n{fields}\r\n\r\n".encode())
        assert read_response(connection)[0] == 413  # which it gets without a part of the body


@pytest.mark.checklist("A11")
def test_a_body_that_does_not_come_is_408(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/tokenize", content_length="100", **JSON_TYPE) + b"{")
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
            connection.sendall(raw_request("POST", "/tokenize", b"x" * 200_000, **fields))
            assert read_response(connection)[0] in (401, 415)
        connection.sendall(raw_request("GET", "/v1/models", authorization="Bearer k"))
        assert read_response(connection)[0] == 200


# Content types, and bodies that are no JSON.


JSON_BODY = b'{"prompt":"hi"}'


@pytest.mark.checklist("A12")
def test_only_json_is_taken(server: RunningServer) -> None:
    def post(content_type: str | None) -> httpx.Response:
        headers = {} if content_type is None else {"content-type": content_type}
        return httpx.post(server.url + "/tokenize", content=b'{"prompt":"hi"}', headers=headers)

    for taken in ("application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"'):
        assert post(taken).status_code == 200, taken
    refused = "text/plain, application/x-www-form-urlencoded, multipart/form-data; boundary=x, application/jsonx, "
    refused += "application/json; charset=latin-1, application/json; charset=utf-16"
    for other in (None, *refused.split(", ")):
        check_error(post(other), 415)
    check_error(httpx.post(server.url + "/nope", content=b"x"), 404)  # where the type does not matter
    check_error(httpx.post(server.url + "/v1/models"), 405)


@pytest.mark.checklist("A01", "A02")
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt":NaN}', b"\xff"])
def test_bodies_that_are_no_json_object_are_400(server: RunningServer, body: bytes) -> None:
    response = httpx.post(server.url + "/tokenize", content=body, headers={"content-type": "application/json"})
    error = check_error(response, 400)
    assert (error["code"], error["param"]) == (None, None)
    assert error["message"].startswith("We could not parse the JSON body of your request.")
