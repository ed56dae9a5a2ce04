"""How `lightwell chat` finds a server, with stub servers over real sockets."""

import http.server
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


def test_one_at_the_default_port_is_taken_silently(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(discovery, "DEFAULT_URL", stub.url)
    with registered(RunningServer(url=stub.url, model="m")):
        assert find_server() == stub.url
    assert capsys.readouterr().err == ""


def test_an_unknown_one_gets_no_key_before_it_is_named(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


def test_one_at_another_port_is_named(stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(RunningServer(url=stub.url, model="m")):
        assert find_server() == stub.url
    assert capsys.readouterr().err == f"lightwell: using m at {stub.url}\n"


def test_several_are_named(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one at the default port is taken."""
    with ExitStack() as stack:
        second = stack.enter_context(StubServer())
        stack.enter_context(registered(RunningServer(url=stub.url, model="first")))
        file = tmp_path / "lightwell" / f"{os.getppid()}.json"
        file.write_text(f'{{"url": "{second.url}", "model": "second"}}')
        assert find_server() in (stub.url, second.url)
        capsys.readouterr()
        monkeypatch.setattr(discovery, "DEFAULT_URL", stub.url)
        assert find_server() == stub.url
        said = capsys.readouterr().err
        assert said == f"lightwell: using first at {stub.url} (--url chooses another: second at {second.url})\n"


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


def test_pythons_file_server_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It likes the same port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(discovery, "DEFAULT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(RemoteError):
            find_server()
        server.shutdown()
        thread.join()


def test_chat_without_a_url(stub: StubServer, tmp_path: Path) -> None:
    """As a command. If something else has the default port on this machine, that is fine too: both are named."""
    with registered(RunningServer(url=stub.url, model="m")):
        done = subprocess.run(
            [sys.executable, "-m", "server.cli.main", "chat"],
            input="Hi\n",
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        )
    assert stub.url in done.stderr
