"""How `lightwell chat` finds a server, with stub servers over real sockets."""

import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.cli import discovery
from server.cli.discovery import find_server
from server.cli.http_client import RemoteError
from server.running_servers import RunningServer, registered
from tests.support.stub_openai import StubServer

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(discovery, "DEFAULT_URL", NOBODY)


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server


def test_no_server_runs() -> None:
    with pytest.raises(RemoteError, match="no server is running here: `lightwell serve` starts one"):
        find_server()
    with registered(RunningServer(url=NOBODY, model="m")), pytest.raises(RemoteError):  # it does not answer
        find_server()


def test_which_is_taken_and_what_is_said(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One at the default port is taken silently, another one is named, and of several the one at that port is taken."""

    def found(default_url: str = NOBODY) -> tuple[str, str]:
        monkeypatch.setattr(discovery, "DEFAULT_URL", default_url)
        return find_server(), capsys.readouterr().err

    with registered(RunningServer(url=stub.url, model="first")), StubServer() as second:
        assert found(stub.url) == (stub.url, "")
        assert found() == (stub.url, f"lightwell: using first at {stub.url}\n")
        file = tmp_path / "lightwell" / f"{os.getppid()}.json"
        file.write_text(f'{{"url": "{second.url}", "model": "second"}}')
        assert found()[0] in (stub.url, second.url)
        said = f"lightwell: using first at {stub.url} (--url chooses another: second at {second.url})\n"
        assert found(stub.url) == (stub.url, said)


def test_an_unknown_one_gets_no_key_before_it_is_named(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be any program, of any user."""
    monkeypatch.setenv("LIGHTWELL_API_KEY", "secret")
    monkeypatch.setattr(discovery, "DEFAULT_URL", stub.url)
    assert find_server() == stub.url
    assert capsys.readouterr().err == f"lightwell: using an unknown server at {stub.url}\n"
    assert [request.headers.get("authorization") for request in stub.seen] == [None]
    with StubServer() as own, registered(RunningServer(url=own.url, model="m")):
        assert find_server() == own.url
    said = capsys.readouterr().err
    assert said == f"lightwell: using m at {own.url} (--url chooses another: an unknown server at {stub.url})\n"


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Run a server that gives one answer to every connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(4096):  # nothing if the connection is only a look at the port
                self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "is_found"),
    [
        (b'HTTP/1.1 401 No\r\ncontent-length: 12\r\n\r\n{"error":{}}', True),
        (b'HTTP/1.1 503 No\r\ncontent-length: 12\r\n\r\n{"error":{}}', True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", False),
        (b"HTTP/1.0 404 File not found\r\ncontent-type: text/html\r\n\r\n<!DOCTYPE HTML>", False),  # Python's own
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"", False),
    ],
)
def test_only_a_model_server_is_one(answer: bytes, is_found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(answer) as url:
        monkeypatch.setattr(discovery, "DEFAULT_URL", url)
        if is_found:
            assert find_server() == url
        else:
            with pytest.raises(RemoteError):
                find_server()


def test_chat_without_a_url(stub: StubServer) -> None:
    """As a command. If something else has the default port on this machine, that is fine too: both are named."""
    command = [sys.executable, "-m", "server.cli.main", "chat"]
    with registered(RunningServer(url=stub.url, model="m")):
        done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, timeout=60, check=False)
    assert stub.url in done.stderr
