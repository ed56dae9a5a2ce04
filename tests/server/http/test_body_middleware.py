"""Limits on the size, time and encoding of request bodies, over real sockets."""

import gzip
import json
import time
from collections.abc import Iterator

import httpx
import pytest

from server.http.body_middleware import BodyMiddleware
from tests.server.conftest import StartServer
from tests.support.serving import (
    RunningServer,
    check_envelope,
    check_error,
    raw_request,
    read_response,
    send_repeatedly,
)

JSON_TYPE = {"content_type": "application/json"}


@pytest.mark.checklist("A12")
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
def test_compressed_bodies_are_never_inflated(server: RunningServer, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    check_error(httpx.post(server.url + "/tokenize", content=gzip.compress(b"0" * 10**7), headers=headers), 415)


@pytest.mark.checklist("A08")
def test_body_over_the_limit_by_content_length(start_server: StartServer) -> None:
    server = start_server(max_body_size=2000)
    fits = json.dumps({"prompt": "x" * 1000}).encode()
    headers = {"content-type": "application/json"}
    assert httpx.post(server.url + "/tokenize", content=fits, headers=headers).status_code == 200
    response = httpx.post(server.url + "/tokenize", content=b" " * 2001, headers=headers)
    assert check_error(response, 413)["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


@pytest.mark.checklist("A08")
def test_body_over_the_limit_by_chunks(start_server: StartServer) -> None:
    server = start_server(max_body_size=100_000)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + "/tokenize", content=chunks(), headers=headers)
    check_error(response, 413)


@pytest.mark.checklist("A08")
def test_an_endless_body_is_cut(start_server: StartServer) -> None:
    server = start_server(max_body_size=100_000)
    with server.connect() as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        with pytest.raises(OSError):
            send_repeatedly(connection, chunk, seconds=10)


def test_a_client_that_waits_for_100_continue_is_refused_at_once(start_server: StartServer) -> None:
    server = start_server(max_body_size=2000)
    with server.connect() as connection:
        fields = "host: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 99999"
        connection.sendall(f"POST /tokenize HTTP/1.1\r\n{fields}\r\n\r\n".encode())
        start = time.monotonic()
        assert read_response(connection)[0] == 413
        assert time.monotonic() - start < 0.5


@pytest.mark.checklist("A11")
def test_a_body_that_does_not_come_is_408(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BodyMiddleware.__init__, "__defaults__", (0.3,))
    server = start_server()
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/tokenize", content_length="100", **JSON_TYPE) + b"{")
        status, headers, body = read_response(connection)
        assert status == 408
        assert headers["connection"] == "close"
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
