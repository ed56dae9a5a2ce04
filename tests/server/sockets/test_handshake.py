"""TLS handshakes that are not completed, over real sockets. test_certificate.py has those that are."""

import select
import socket
import ssl
from contextlib import ExitStack

import httpx
import pytest

from server.sockets import handshake
from server.sockets.certificate import Certificate
from tests.server.conftest import StartServer
from tests.support.paths import ROOT
from tests.support.serving import RunningServer, raw_request, wait_until

TLS = ROOT / "tests/support/tls"
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)  # the start of a ClientHello


@pytest.fixture
def server(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server with HTTPS, which has room for 8 handshakes."""
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 8)
    return start_server(server={"certificate": Certificate(str(TLS / "one.crt"), str(TLS / "one.key"))})


def is_cut(connection: socket.socket) -> bool:
    """Whether the server has closed a connection. Reads nothing."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return poll.poll(0) != []


@pytest.mark.checklist("A16")
def test_the_oldest_handshakes_make_room(server: RunningServer) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(
            socket.create_connection(("127.0.0.1", server.port), source_address=("127.0.0.3", 0))
        )
        other.sendall(HELLO)
        connections = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in connections:
            connection.sendall(HELLO)
        wait_until(lambda: sum(map(is_cut, connections)) == 13)
        assert all(map(is_cut, connections[:13]))
        assert httpx.get(server.url + "/health", verify=False).status_code == 200  # in place of another one
        server.turn(handshake.HANDSHAKE_SECONDS / 2)
        assert [is_cut(each) for each in (other, *connections)] == [False] + [True] * 14 + [False] * 6
        server.turn(handshake.HANDSHAKE_SECONDS)  # their time is up
        wait_until(lambda: is_cut(other) and all(map(is_cut, connections)))


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", HELLO, b"\x16\x03\x01\x00\x05hello"])
def test_what_is_no_handshake_ends(server: RunningServer, data: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        if not data:
            connection.shutdown(socket.SHUT_WR)

        def is_over() -> bool:
            server.turn(handshake.HANDSHAKE_SECONDS)
            return is_cut(connection)

        wait_until(is_over)
        connection.settimeout(60)
        try:
            while connection.recv(1 << 16):  # an alert, if anything
                pass
        except ConnectionResetError:
            pass
    assert httpx.get(server.url + "/health", verify=False).status_code == 200


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(server: RunningServer) -> None:
    """In one segment, so that both are read at once."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with server.connect() as connection:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(1 << 16))
        client.write(raw_request("GET", "/health", connection="close"))
        connection.sendall(outgoing.read())
        answer = b""
        while b"HTTP/1.1 200" not in answer:
            received = connection.recv(1 << 16)
            assert received
            incoming.write(received)
            try:
                answer += client.read(1 << 16)
            except ssl.SSLWantReadError:
                continue


def test_large_bodies_and_answers_pass(server: RunningServer) -> None:
    text = "x" * 200_000
    response = httpx.post(server.url + "/tokenize", json={"prompt": text}, verify=False, timeout=60)
    assert response.json()["count"] == len(text)
