"""Slow, broken, pipelined and idle connections, over real sockets."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import h11
import httpx
import pytest

from server.api_server import KEEP_ALIVE
from server.parts.hardening import protocol
from tests.server.conftest import StartServer
from tests.support.clients import COMPLETIONS
from tests.support.fake_engine import FakeEngine
from tests.support.serving import (
    RunningServer,
    check_envelope,
    is_closed,
    is_cut,
    raw_request,
    read_response,
    wait_until,
)

JSON_BODY = b'{"prompt":"hi"}'
JSON_TYPE = {"content_type": "application/json"}


def ask_health(connection: socket.socket) -> None:
    connection.sendall(raw_request("GET", "/health"))
    assert read_response(connection)[0] == 200


@pytest.mark.checklist("A11")
def test_a_head_that_trickles_is_cut(server: RunningServer) -> None:
    """A connection after a response is idle, not slow: it has the time of keep-alive."""
    with server.connect() as trickling, server.connect() as silent, server.connect() as idle:
        ask_health(idle)
        for byte in b"GET /health HTTP/1.1\r\nhost: a\r\nx: ":
            with contextlib.suppress(ConnectionError):
                trickling.sendall(bytes([byte]))
            server.turn(1.0)
        assert is_closed(trickling)
        assert is_closed(silent)
        ask_health(idle)
        server.turn(KEEP_ALIVE - 1.0)
        ask_health(idle)
        server.turn(KEEP_ALIVE + 1.0)
        assert is_closed(idle)


@pytest.mark.checklist("A10")
@pytest.mark.parametrize("head", [b"x: " + b"a" * 100_000, b"\r\n".join(b"x%d: y" % i for i in range(10_000))])
def test_a_huge_head_is_431(server: RunningServer, head: bytes) -> None:
    with server.connect() as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
            status, _, body = read_response(connection)
        except ConnectionError:
            return  # closed while the test was still writing
        assert status == 431
        check_envelope(body)


GET = b"GET /health HTTP/1.1\r\nhost: a"
POST = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\nhost: a\r\n\r\n"  # must never be answered

CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"

LINES = [  # after the first ones of a head: bare line feeds, folds, NUL, and fields without a name or a colon
    *(b"\nx: y\r\n\r\n", b"\n\r\n", b"\nx", b"\r\r\n\r\n"),
    *(b"\r\nx: y\r\n z\r\n\r\n", b"\r\n\tx: y\r\n\r\n"),
    *(b"\r\nx: a\x00b\r\n\r\n", b"\r\n: b\r\n\r\n", b"\r\nx\r\n\r\n"),
]
FRAMING = [  # lengths that are repeated or no decimal numbers, codings that are repeated or unknown, or both
    *(b"content-length:\r\n 5", b"content-length : 5", b"content-length: 38, 38", b"content-length:"),
    b"content-length: 0\r\ncontent-length: 38",
    b"content-length: 38\r\nContent-Length: 38",
    *(b"content-length: +0", b"content-length: 0x0", "content-length: \u0665".encode()),
    b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0",
    b"Transfer-Encoding: chunked\r\ncontent-length: 5\r\n\r\n0",
    b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0",
    *(b"transfer-encoding: xchunked\r\n\r\n0", b"transfer-encoding: \x0bchunked\r\n\r\n0"),
]
CHUNKS = [  # bare line feeds, sizes that are wrong or no hexadecimal numbers, and a trailer that is folded
    *(b"2\n{}\r\n0\r\n\r\n", b"2\r\n{}\n0\r\n\r\n", b"2\r\n{}\r\n0\r\nx: y\n\r\n"),
    *(b"2\r\n{}0\r\n\r\n0\r\n\r\n", b"+2\r\n{}\r\n0\r\n\r\n", b"f" * 21 + b"\r\n{}\r\n0\r\n\r\n"),
    b"2\r\n{}\r\n0\r\nx: y\r\n z\r\n\r\n",
]
SMUGGLING = [
    *(GET + each for each in LINES),
    *(POST + each + b"\r\n\r\n" + SMUGGLED for each in FRAMING),
    *(CHUNKED + each for each in CHUNKS),
    CHUNKED.replace(b"1.1", b"1.0", 1) + b"0\r\n\r\n" + SMUGGLED,
    b"GET /health HTTP/1.1\nhost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\n host: a\r\n\r\n",
    b"GET /health /x HTTP/1.1\r\nhost: a\r\n\r\n",
    *(b"GET /health\r\nhost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"hello\r\n\r\n"),
    b"\r\nGET /health HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    *(b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nx y: 1\r\n\r\n"),
]


def pieces(data: bytes, in_pieces: bool) -> Iterator[bytes]:
    return (data[start : start + 1] for start in range(len(data))) if in_pieces else iter((data,))


def read_all(connection: socket.socket) -> bytes:
    """Return what is received until the end of the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


@pytest.mark.checklist("A09", "A18")
@pytest.mark.parametrize("data", SMUGGLING, ids=repr)
def test_what_a_proxy_may_read_differently_is_refused(server: RunningServer, data: bytes) -> None:
    """The answer is 400, and the connection is closed, so that nothing after it is answered."""
    with server.connect() as connection:
        connection.sendall(data)
        status, headers, body = read_response(connection)
        assert (status, headers["connection"]) == (400, "close")
        assert headers["x-request-id"]
        check_envelope(body)
        assert read_all(connection) == b""
    with server.connect() as connection:
        for piece in pieces(data, in_pieces=True):
            with contextlib.suppress(ConnectionError):
                connection.sendall(piece)
        assert re.findall(rb"HTTP/1.1 (\d+)", read_all(connection)) in ([b"400"], [])


@pytest.mark.checklist("A18")
@pytest.mark.parametrize("in_pieces", [False, True])
def test_what_follows_a_head_is_not_part_of_it(server: RunningServer, in_pieces: bool) -> None:
    """Bodies may have bare line feeds and lines that begin with spaces, and end anywhere."""
    body = b'\n {"prompt":\n "hi"}\r\n\r\n\n'
    chunks = b"%x;x=y\r\n%s\r\n0\r\nx: y\r\n\r\n" % (len(body), body)
    data = (raw_request("POST", "/tokenize", body, **JSON_TYPE) + CHUNKED + chunks) * 2
    with server.connect() as connection:
        for piece in pieces(data, in_pieces):
            connection.sendall(piece)
        connection.sendall(raw_request("GET", "/nowhere", connection="close"))
        assert re.findall(rb"HTTP/1.1 (\d+)", read_all(connection)) == [b"200"] * 4 + [b"404"]


@pytest.mark.checklist("A16")
def test_a_new_connection_closes_one_which_has_waited_longest(start_server: StartServer) -> None:
    """Not more, so that clients that connect again at once cost little; and what was used since then stays open."""
    server = start_server(server={"max_connections": 128})
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(129)]
        wait_until(lambda: is_cut(idle[0]))
        ask_health(idle[1])
        stack.enter_context(server.connect())
        wait_until(lambda: is_cut(idle[2]))
        assert [number for number, connection in enumerate(idle) if is_cut(connection)] == [0, 2]


@pytest.mark.checklist("A16")
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_trickles_is_passed_on_in_pieces(is_chunked: bool) -> None:
    """Not each byte, which would wake the application; what follows the body is not part of it."""
    body = bytes(range(256)) * 40
    pieces = [b"1\r\n%c\r\n" % byte for byte in body] + [b"0\r\n\r\n"] if is_chunked else [bytes([x]) for x in body]
    connection = protocol.StrictConnection()
    connection.receive_data(CHUNKED if is_chunked else POST + b"content-length: %d\r\n\r\n" % len(body))
    request, *data = events_of(connection)
    for piece in (*pieces[:-1], pieces[-1] + SMUGGLED):
        connection.receive_data(piece)
        data += events_of(connection)
    *data, end = data
    assert isinstance(request, h11.Request)
    assert [len(event.data) for event in data] == [4096, 4096, 2048]
    assert b"".join(event.data for event in data) == body
    assert isinstance(end, h11.EndOfMessage)
    assert connection.trailing_data == (SMUGGLED, False)


def test_a_body_in_very_many_chunks_is_413(server: RunningServer) -> None:
    """Each takes time, whatever its size. The next request begins to count anew."""
    text = b'{"tokens": [1]}'
    chunks = b"1\r\n \r\n" * (protocol.MAX_CHUNKS - len(text)) + b"".join(b"1\r\n%c\r\n" % byte for byte in text)
    with server.connect() as connection:
        for more, status in ((b"", 200), (b"", 200), (b"1\r\n \r\n", 413)):
            connection.sendall(CHUNKED.replace(b"/tokenize", b"/detokenize") + more + chunks + b"0\r\n\r\n")
            answer = read_response(connection)
            assert answer[0] == status
        assert check_envelope(answer[2])["message"].endswith("more than 32768 chunks.")


def events_of(connection: protocol.StrictConnection) -> Iterator[Any]:
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        yield event


@pytest.mark.checklist("A09")
def test_an_invalid_body_of_a_request_that_is_being_answered(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as connection:
        connection.sendall(CHUNKED.replace(b"/tokenize", b"/v1/nothing") + b"no chunk\r\n")
        status, _, body = read_response(connection)
        assert (status, connection.recv(1)) == (400, b"")
    check_envelope(body)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.checklist("A16")
@pytest.mark.parametrize("kind", ["body", "reader"])
def test_slow_bodies_and_readers_make_room(start_server: StartServer, fake_engine: FakeEngine, kind: str) -> None:
    """The oldest ones of the address that has most connections; an answer that is read goes on."""
    server = start_server(max_logprobs=-1, server={"max_connections": 6})
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.002
    fields = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 1900}
    data = raw_request("POST", "/tokenize", JSON_BODY, **JSON_TYPE)[:-1]
    if kind == "reader":
        data = raw_request("POST", COMPLETIONS, json.dumps(fields | {"logprobs": 250}).encode(), **JSON_TYPE)
    with contextlib.ExitStack() as stack:
        events = stack.enter_context(httpx.stream("POST", server.url + COMPLETIONS, json=fields)).iter_lines()
        other = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), None, ("127.0.0.3", 0)))
        slow = [stack.enter_context(server.connect()) for _ in range(4)]
        ports = [connection.getsockname()[1] for connection in slow]

        def are_held_up() -> bool:
            """Whether all wait for the rest of a body, or until the client reads."""
            mine = [each for each in server.connections if each.client and each.client[1] in ports and each.cycle]
            return [each.flow.write_paused if kind == "reader" else each.cycle.more_body for each in mine] == [True] * 4

        for connection in slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(data)
            assert "choices" in next(line for line in events if line)
        # What a stream may not send to the system any more, this process holds.
        wait_until(lambda: are_held_up() and (kind == "body" or server.context.answers.num_bytes > 1 << 20))
        server.turn(protocol.STALL_SECONDS + 0.1)
        assert "choices" in next(line for line in events if line)
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=60) as client:
            assert client.get(server.url + "/health").status_code == 200
        if kind == "body":
            assert [is_cut(connection) for connection in slow] == [True, False, False, False]
        else:  # what it was sent before is still to be read
            wait_until(lambda: server.engine.num_choices == 4)
        ask_health(other)
        assert "choices" in next(line for line in events if line)


def test_https_on_the_plain_port_is_explained(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """In the log, and in plain text to the client, which cannot read anything else yet."""
    with pytest.raises(httpx.ConnectError, match=r"(?i)ssl|tls"):
        httpx.get(server.url.replace("http:", "https:") + "/v1/models", verify=False)
    assert "spoke TLS, but this server speaks plain HTTP" in caplog.text
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x00\xa5" + b"\x00" * 165)
        status, _, body = read_response(connection)
        assert status == 400
        assert "begins with http://, not https://" in check_envelope(body)["message"]
