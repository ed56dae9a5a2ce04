"""HTTPS over real sockets: a certificate that can change, invalid files, and handshakes that are not completed."""

import shutil
import socket
import ssl
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from server.api_server import TICK
from server.parts.hardening import tls as handshake
from server.parts.hardening.tls import Certificate
from tests.server.conftest import StartServer
from tests.support.paths import ROOT
from tests.support.serving import RunningServer, is_cut, raw_request, wait_until

TLS = ROOT / "tests/support/tls"
ONE, TWO = "one", "two"
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)  # the start of a ClientHello


def put(folder: Path, name: str) -> None:
    """Copy a pair of files to `folder`."""
    shutil.copy(TLS / f"{name}.key", folder / "server.key")
    shutil.copy(TLS / f"{name}.crt", folder / "server.crt")


def trusting(name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=TLS / f"{name}.crt")


def is_used(url: str, name: str) -> bool:
    """Return whether a new connection gets this certificate."""
    try:
        return httpx.get(f"{url}/healthz", verify=trusting(name), trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False


def test_a_changed_certificate_is_used_without_a_restart(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that are open go on. An invalid change has no effect."""
    put(tmp_path, ONE)
    server = start_server(ssl_certfile=str(tmp_path / "server.crt"), ssl_keyfile=str(tmp_path / "server.key"))
    with httpx.Client(verify=trusting(ONE), trust_env=False) as client:
        assert client.get(f"{server.url}/healthz").status_code == 200
        shutil.copy(TLS / "two.crt", tmp_path / "server.crt")
        server.turn(TICK)
        assert "the certificate has changed, but is not used" in caplog.text
        (tmp_path / "server.key").unlink()
        server.turn(TICK)
        assert "No such file or directory" in caplog.text
        assert (is_used(server.url, ONE), is_used(server.url, TWO)) == (True, False)
        put(tmp_path, TWO)
        server.turn(TICK)
        assert (is_used(server.url, ONE), is_used(server.url, TWO)) == (False, True)
        assert client.get(f"{server.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("crt", "key", "message"),
    [
        ("one.crt", "two.key", "--ssl-keyfile .*two.key: the private key does not belong to the certificate"),
        ("one.crt", "no.key", "--ssl-keyfile .*no.key: No such file or directory"),
        ("no.crt", "one.key", "--ssl-certfile .*no.crt: No such file or directory"),
        ("one.key", "one.key", "--ssl-certfile .*one.key: has no certificate in PEM format"),
        ("one.crt", "one.crt", "--ssl-keyfile .*one.crt: has no private key in PEM format"),
        ("one.crt", None, "--ssl-certfile .*one.crt: has no private key in PEM format; --ssl-keyfile names its file"),
        ("one.crt", "encrypted.key", "--ssl-keyfile .*encrypted.key: the private key is encrypted"),
        (".", "one.key", "--ssl-certfile .*: Is a directory"),
    ],
)
def test_invalid_files_are_named(crt: str, key: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Certificate(str(TLS / crt), None if key is None else str(TLS / key))


def test_certificate_and_key_may_be_one_file(tmp_path: Path) -> None:
    file, content = tmp_path / "a.pem", (TLS / "one.crt").read_bytes()
    file.write_bytes((TLS / "one.key").read_bytes() + content)
    assert Certificate(str(file), None).context.get_ca_certs() == []
    file.write_bytes(content[:100] + b"\n-----END CERTIFICATE-----\n")
    with pytest.raises(ValueError, match=r"a\.pem: not a valid certificate and key"):
        Certificate(str(file), str(TLS / "one.key"))


# Handshakes.


@pytest.fixture
def server(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server with HTTPS, which has room for 8 handshakes."""
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 8)
    return start_server(ssl_certfile=str(TLS / "one.crt"), ssl_keyfile=str(TLS / "one.key"))


@pytest.mark.checklist("A16")
def test_the_oldest_handshakes_make_room(server: RunningServer) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), None, ("127.0.0.3", 0)))
        connections = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in (other, *connections):
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
        assert httpx.get(server.url + "/health", verify=False).status_code == 200  # others are not disturbed

        def is_over() -> bool:
            server.turn(handshake.HANDSHAKE_SECONDS)
            return is_cut(connection)

        wait_until(is_over)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 16):  # an alert, if anything
                pass


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(server: RunningServer) -> None:
    """In one segment, so that both are read at once."""
    context = ssl._create_unverified_context()
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
            with suppress(ssl.SSLWantReadError):
                answer += client.read(1 << 16)


def test_large_bodies_and_answers_pass(server: RunningServer) -> None:
    text = "x" * 200_000
    response = httpx.post(server.url + "/tokenize", json={"prompt": text}, verify=False, timeout=60)
    assert response.json()["count"] == len(text)
