"""How `lightwell chat` finds a server: the files of those that run, what answers at a port, and its address."""

import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.cli import http_client
from server.cli.http_client import base_url, connect, find_model, find_server
from server.cli.parser import CommandError
from server.http.errors import EngineUnavailableError
from server.parts.bench.bench import run_benchmark
from server.parts.bench.commands import LoadOptions
from server.running_servers import RunningServer, folder, registered, registered_servers
from tests.server.conftest import StartServer
from tests.support.paths import ROOT
from tests.support.stub_openai import StubServer

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let no server be found. Return where the files of servers would be."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(http_client, "DEFAULT_URL", NOBODY)
    return tmp_path / "lightwell"


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server


def test_no_server_runs() -> None:
    with pytest.raises(CommandError, match="no server is running here: `lightwell serve` starts one"):
        find_server()
    with registered(RunningServer(url=NOBODY, model="m")), pytest.raises(CommandError):  # it does not answer
        find_server()


def test_which_is_taken_and_what_is_said(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One at the default port is taken silently, another one is named, and of several the one at that port is taken."""

    def found(default_url: str = NOBODY) -> tuple[str, str]:
        monkeypatch.setattr(http_client, "DEFAULT_URL", default_url)
        return find_server(), capsys.readouterr().err

    with registered(RunningServer(url=stub.url, model="first")), StubServer() as second:
        assert found(stub.url) == (stub.url, "")
        assert found() == (stub.url, f"lightwell: using first at {stub.url}\n")
        (tmp_path / "lightwell" / f"{os.getppid()}.json").write_text(f'{{"url": "{second.url}", "model": "second"}}')
        assert found()[0] in (stub.url, second.url)
        said = f"lightwell: using first at {stub.url} (--url chooses another: second at {second.url})\n"
        assert found(stub.url) == (stub.url, said)


def test_an_unknown_one_gets_no_key_before_it_is_named(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be any program, of any user."""
    monkeypatch.setenv("LIGHTWELL_API_KEY", "secret")
    monkeypatch.setattr(http_client, "DEFAULT_URL", stub.url)
    assert find_server() == stub.url
    assert capsys.readouterr().err == f"lightwell: using an unknown server at {stub.url}\n"
    assert [request.headers.get("authorization") for request in stub.seen] == [None]
    with StubServer() as own, registered(RunningServer(url=own.url, model="m")):
        assert find_server() == own.url
    said = capsys.readouterr().err
    assert said == f"lightwell: using m at {own.url} (--url chooses another: an unknown server at {stub.url})\n"


def test_only_a_model_server_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(socketserver.BaseRequestHandler):
        answer = b""

        def handle(self) -> None:
            if self.request.recv(4096):  # nothing if the connection is only a look at the port
                self.request.sendall(self.answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(http_client, "DEFAULT_URL", url := f"http://127.0.0.1:{server.server_address[1]}")
        for answer, is_found in (
            (b'HTTP/1.1 401 No\r\ncontent-length: 12\r\n\r\n{"error":{}}', True),
            (b'HTTP/1.1 503 No\r\ncontent-length: 12\r\n\r\n{"error":{}}', True),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", False),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", False),
            (b"HTTP/1.0 404 File not found\r\ncontent-type: text/html\r\n\r\n<!DOCTYPE HTML>", False),  # Python's own
            (b"SSH-2.0-OpenSSH\r\n", False),
            (b"", False),
        ):
            Handler.answer = answer
            if is_found:
                assert find_server() == url
            else:
                with pytest.raises(CommandError):
                    find_server()
        server.shutdown()


def test_chat_without_a_url(stub: StubServer) -> None:
    """As a command. If something else has the default port on this machine, that is fine too: both are named."""
    command = [sys.executable, "-m", "server.cli.main", "chat"]
    with registered(RunningServer(url=stub.url, model="m")):
        done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, timeout=60, check=False)
    assert stub.url in done.stderr


ONE, TWO = (RunningServer(url=f"http://127.0.0.1:{port}", model="m") for port in (1, 2))


def test_the_last_server_is_first_and_files_of_ended_processes_are_removed(runtime_folder: Path) -> None:
    assert registered_servers() == []
    with registered(ONE), subprocess.Popen(["sleep", "60"]) as other:
        assert runtime_folder.stat().st_mode & 0o777 == 0o700
        later = time.time() + 10
        (file := runtime_folder / f"{other.pid}.json").write_text('{"url": "http://127.0.0.1:2", "model": "m"}')
        os.utime(file, (later, later))
        assert registered_servers() == [TWO, ONE]
        other.kill()
        other.wait()
        assert registered_servers() == [ONE]
        assert not file.exists()
    assert registered_servers() == []


def test_files_that_cannot_be_used_are_ignored(runtime_folder: Path) -> None:
    with registered(ONE):
        file = runtime_folder / f"{os.getppid()}.json"
        for content in (b"", b"{", b"{}", b"[1]", b"\0", b"\xff", b'{"a": ' + 100_000 * b"["):
            file.write_bytes(content)
            assert registered_servers() == [ONE]
        if os.getuid() == 0:
            file.write_text('{"url": "http://127.0.0.1:2", "model": "m"}')
            assert TWO in registered_servers()
            os.chown(file, 12345, -1)  # of another user
            assert registered_servers() == [ONE]


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the cache where there is no runtime folder. Without it nothing fails."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with registered(ONE):
        assert registered_servers() == []
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path))
    assert folder() == tmp_path / "servers"


TLS = ROOT / "tests/support/tls"


def test_addresses() -> None:
    assert base_url("http://localhost:8000") == base_url("http://localhost:8000/v1/") == "http://localhost:8000"
    assert base_url("https://example.org/llm/v1") == "https://example.org/llm"
    assert base_url("http://[::1]:80/") == "http://[::1]:80"
    for url in ("localhost:8000", "ftp://x", "http://", "http://x:port", "http://k:p@x", "http://x?a=1"):
        with pytest.raises(ValueError):
            base_url(url)


@pytest.mark.parametrize("key", ["sk-ü", "a\tb", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(CommandError, match="invalid API key: expected printable ASCII characters"):
        connect("http://localhost:1", key)


def test_a_server_that_is_loading_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another 503 is an error."""
    monkeypatch.setattr(http_client, "LOADING_POLL_SECONDS", 0.0)
    loading, draining = (
        EngineUnavailableError(f"The {problem}.").response().body
        for problem in ("model is still being loaded", "server is shutting down")
    )
    answers = [httpx.Response(503, content=bytes(body)) for body in (loading, loading, loading, draining)]
    answers.insert(3, httpx.Response(200, json={"data": [{"id": "m"}]}))
    with httpx.Client(base_url="http://x", transport=httpx.MockTransport(lambda request: answers.pop(0))) as client:
        assert find_model(client) == "m"
        assert capsys.readouterr().err == "http://x is still loading its model\n"
        with pytest.raises(CommandError, match="shutting down"):
            find_model(client)


def check_refused(url: str, message: str) -> None:
    with connect(url, None) as client, pytest.raises(CommandError, match=message):
        find_model(client)


def test_addresses_at_which_no_server_answers(server: RunningServer) -> None:
    https = server.url.replace("http:", "https:")
    check_refused(https, r"no server answers at https://.*SSL")
    check_refused("http://a..b", r"^no server answers at http://a\.\.b")  # which no DNS has


@pytest.fixture
def tls_url(start_server: StartServer) -> str:
    """The address of a server on loopback whose certificate nobody has signed."""
    return start_server(ssl_certfile=str(TLS / "one.crt"), ssl_keyfile=str(TLS / "one.key")).url


def test_a_private_authority_is_trusted_on_loopback_too(tls_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "one.crt"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # not for loopback
    with connect(tls_url, None) as client:
        assert find_model(client) == "tiny"


@pytest.mark.parametrize("authority", ["two.crt", None])
def test_a_certificate_that_is_not_trusted_is_not_taken_for_a_plain_port(
    tls_url: str, monkeypatch: pytest.MonkeyPatch, authority: str | None
) -> None:
    if authority is not None:
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / authority))
    message = rf"no server answers at {tls_url} \(.*self-signed certificate"
    check_refused(tls_url, f"^{message}")
    with pytest.raises(CommandError, match=f"^{message}"):
        run_benchmark(LoadOptions(url=tls_url, model="m", num_requests=1))
