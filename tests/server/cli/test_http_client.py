"""The addresses of servers, and servers that are not ready; test_chat.py tests requests and other errors."""

import httpx
import pytest

from server.cli import http_client
from server.cli.http_client import RemoteError, base_url, connect, find_model
from server.http.errors import EngineUnavailableError
from tests.support.serving import RunningServer


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.org/llm/v1", "https://example.org/llm"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    assert base_url(url) == expected


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://k:p@x", "http://x?a=1"]
)
def test_bad_addresses(url: str) -> None:
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


def test_https_at_a_plain_port_is_explained(shared_server: RunningServer) -> None:
    with (
        connect(shared_server.url.replace("http:", "https:"), None) as client,
        pytest.raises(RemoteError, match=r"no TLS at https://.*: should the address begin with http://\?"),
    ):
        find_model(client)
