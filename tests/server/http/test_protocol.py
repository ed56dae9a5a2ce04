"""Slow, broken, pipelined and idle connections, over real sockets."""

import re
import socket
import time

import httpx
import pytest

from server.http.protocol import HTTPProtocol
from tests.server.conftest import StartServer
from tests.support.serving import (
    RunningServer,
    check_envelope,
    raw_request,
    read_response,
    send_repeatedly,
)

JSON_BODY = b'{"prompt":"hi"}'
JSON_TYPE = {"content_type": "application/json"}


@pytest.mark.checklist("A11")
def test_a_head_that_trickles_is_cut(start_server: StartServer) -> None:
    class Impatient(HTTPProtocol):
        head_timeout = 0.4

    server = start_server(server={"protocol": Impatient})
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            send_repeatedly(connection, b"x", seconds=2, pause=0.05)
    with server.connect() as silent:
        assert silent.recv(1) == b""
    with server.connect() as connection:  # a connection after a response is idle, not slow
        connection.sendall(raw_request("GET", "/health"))
        assert read_response(connection)[0] == 200
        time.sleep(0.6)
        connection.sendall(raw_request("GET", "/health"))
        assert read_response(connection)[0] == 200


@pytest.mark.checklist("A09")
@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx y: 1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_broken_http_is_400_in_the_envelope(shared_server: RunningServer, data: bytes) -> None:
    with shared_server.connect() as connection:
        connection.sendall(data)
        status, headers, body = read_response(connection)
        assert status == 400
        assert headers["connection"] == "close"
        assert headers["x-request-id"]
        check_envelope(body)
        assert connection.recv(1) == b""


@pytest.mark.checklist("A10")
@pytest.mark.parametrize("head", [b"x: " + b"a" * 100_000, b"\r\n".join(b"x%d: y" % i for i in range(10_000))])
def test_a_huge_head_is_431(shared_server: RunningServer, head: bytes) -> None:
    with shared_server.connect() as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
            status, _, body = read_response(connection)
        except ConnectionError:
            return  # closed while the test was still writing
        assert status == 431
        check_envelope(body)


@pytest.mark.checklist("A14")
def test_pipelined_requests_are_answered_in_order(shared_server: RunningServer) -> None:
    with shared_server.connect() as connection:
        bad = raw_request("POST", "/tokenize", b"{", **JSON_TYPE)
        good = raw_request("POST", "/tokenize", JSON_BODY, **JSON_TYPE)
        connection.sendall(bad + good + raw_request("GET", "/nowhere", connection="close"))
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"400", b"200", b"404"]


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(1)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.checklist("A16")
def test_idle_connections_make_room(start_server: StartServer) -> None:
    server = start_server(server={"max_connections": 20})
    idle = [server.connect() for _ in range(60)]
    try:
        assert httpx.get(server.url + "/health").status_code == 200
        assert all(map(is_closed, idle[:40]))
    finally:
        for connection in idle:
            connection.close()


def test_https_on_the_plain_port_is_explained(shared_server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """In the log, and in plain text to the client, which cannot read anything else yet."""
    with pytest.raises(httpx.ConnectError, match=r"(?i)ssl|tls"):
        httpx.get(shared_server.url.replace("http:", "https:") + "/v1/models", verify=False)
    assert "spoke TLS, but this server speaks plain HTTP" in caplog.text
    with shared_server.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x00\xa5" + b"\x00" * 165)
        status, _, body = read_response(connection)
        assert status == 400
        assert "begins with http://, not https://" in check_envelope(body)["message"]
