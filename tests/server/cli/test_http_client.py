"""The addresses of servers, and servers that are not ready; test_chat.py tests requests and other errors."""

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from server.cli import http_client
from server.cli.bench import run_benchmark
from server.cli.http_client import RemoteError, base_url, connect, find_model
from server.cli.load_generator import LoadOptions
from server.http.errors import EngineUnavailableError
from tests.support.paths import ROOT
from tests.support.serving import RunningServer

TLS = ROOT / "tests/support/tls"


def test_addresses() -> None:
    for url, expected in (
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.org/llm/v1", "https://example.org/llm"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ):
        assert base_url(url) == expected
    for url in ("localhost:8000", "ftp://x", "http://", "http://x:port", "http://k:p@x", "http://x?a=1"):
        with pytest.raises(ValueError):
            base_url(url)


@pytest.mark.parametrize("key", ["sk-ü", "a\tb", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(RemoteError, match="invalid API key: expected printable ASCII characters"):
        connect("http://localhost:1", key)


def test_a_server_that_is_loading_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_client, "LOADING_POLL_SECONDS", 0.0)
    loading = EngineUnavailableError("The model is still being loaded.").response()
    answers = [httpx.Response(503, content=bytes(loading.body)) for _ in range(3)]
    answers.append(httpx.Response(200, json={"data": [{"id": "m"}]}))
    transport = httpx.MockTransport(lambda request: answers.pop(0))
    with httpx.Client(base_url="http://x", transport=transport) as client:
        assert find_model(client) == "m"
    assert capsys.readouterr().err == "http://x is still loading its model\n"


def test_another_503_is_an_error() -> None:
    draining = EngineUnavailableError("The server is shutting down.").response()
    transport = httpx.MockTransport(lambda request: httpx.Response(503, content=bytes(draining.body)))
    with (
        httpx.Client(base_url="http://x", transport=transport) as client,
        pytest.raises(RemoteError, match="shutting down"),
    ):
        find_model(client)


def test_https_at_a_plain_port_is_explained(server: RunningServer) -> None:
    with (
        connect(server.url.replace("http:", "https:"), None) as client,
        pytest.raises(RemoteError, match=r"no TLS at https://.*: should the address begin with http://\?"),
    ):
        find_model(client)


class _Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def tls_url() -> Iterator[str]:
    """The address of a server on loopback whose certificate nobody has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "one.crt", TLS / "one.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Models) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_private_authority_is_trusted_on_loopback_too(tls_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "one.crt"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # not for loopback
    with connect(tls_url, None) as client:
        assert find_model(client) == "m"


@pytest.mark.parametrize("authority", ["two.crt", None])
def test_a_certificate_that_is_not_trusted_is_not_taken_for_a_plain_port(
    tls_url: str, monkeypatch: pytest.MonkeyPatch, authority: str | None
) -> None:
    if authority is not None:
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / authority))
    message = f"the certificate of {tls_url} is not accepted: self-signed certificate; SSL_CERT_FILE names the auth"
    with connect(tls_url, None) as client, pytest.raises(RemoteError, match=f"^{message}"):
        find_model(client)
    with pytest.raises(RemoteError, match=f"^{message}"):
        run_benchmark(LoadOptions(url=tls_url, model="m", num_requests=1))


def test_a_host_that_no_dns_has() -> None:
    with (
        connect("http://a..b", None) as client,
        pytest.raises(RemoteError, match=r"^no server answers at http://a\.\.b"),
    ):
        find_model(client)
