"""Request ids, the access log, HTTP metrics and status 500, over real sockets."""

import gc
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from server.http.request_middleware import Exchange, choose_request_id
from tests.server.conftest import StartServer
from tests.support.clients import COMPLETIONS, shared_server
from tests.support.serving import RunningServer, check_error, is_served, raw_request, read_response, wait_until


@pytest.mark.checklist("A15")
def test_only_a_harmless_request_id_is_kept() -> None:
    for given in ("abc", "A.b_c-1", "x" * 128):
        assert choose_request_id(given) == given
    for other in ("", "a b", "a\x1b[31m", "x" * 129, "ü", "a/b", "a\r\nb", "a\n", None):
        assert re.fullmatch("req_[0-9a-f]{32}", choose_request_id(other)), other


@pytest.mark.checklist("E12")
def test_every_answer_has_an_id_of_its_own(server: RunningServer) -> None:
    responses = [httpx.get(server.url + path) for path in ("/health", "/nowhere", "/v1/models", "/metrics") * 2]
    assert len({response.headers["x-request-id"] for response in responses}) == 8


def access_records(caplog: pytest.LogCaptureFixture, number: int = 1, path: str = "") -> list[logging.LogRecord]:
    """Wait for this number of lines of the access log, of paths that end with `path`."""

    def records() -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.name == "server.access" and each.getMessage().endswith(path)]

    wait_until(lambda: len(records()) >= number)
    return records()


def access_fields(caplog: pytest.LogCaptureFixture, path: str = COMPLETIONS) -> dict[str, Any]:
    """Wait for the line of the only request to `path` since the last call, and return its fields."""
    (record,) = access_records(caplog, path=path)
    caplog.clear()
    return dict(record.__dict__["fields"])


def test_one_line_for_each_request(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = "/x%0a%1b[31m%20status=200?key=secret"
    with server.connect() as connection:
        connection.sendall(raw_request("GET", path, x_request_id="mine", connection="close"))
        assert read_response(connection)[0] == 404
    (record,) = access_records(caplog)
    assert record.getMessage() == "GET /x%0A%1B[31m%20status=200"
    expected = {"request_id": "mine", "status": 404, "client": "127.0.0.1"}
    assert expected.items() <= record.__dict__["fields"].items()
    assert "secret" not in str(record.__dict__)


def test_frequent_requests_are_logged_at_level_debug(
    server: RunningServer, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that say that the server is not ready."""
    caplog.set_level(logging.DEBUG)
    for path in ("/health", "/healthz", "/readyz", "/metrics", "/v1/models"):
        assert httpx.get(server.url + path).status_code == 200
    assert [record.levelname for record in access_records(caplog, 5)] == ["DEBUG"] * 4 + ["INFO"]
    caplog.clear()
    draining = start_server(api_key=("k",))
    draining.model.client.drain()
    assert httpx.get(draining.url + "/readyz").status_code == 503
    assert httpx.get(draining.url + "/metrics").status_code == 401  # a scraper without the key
    assert [record.levelname for record in access_records(caplog, 2)] == ["DEBUG", "INFO"]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_speed_of_a_generation(
    server: RunningServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """The counts are those of the answer's `usage`."""
    caplog.set_level(logging.INFO)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = {"model": "tiny", "prompt": "Hello", "n": 2, "max_tokens": 5, "stream": stream, **options}
    text = httpx.post(server.url + COMPLETIONS, json=body).text
    usage = json.loads(text.split("data: ")[-2] if stream else text)["usage"]
    fields = access_fields(caplog)
    assert {name: fields[name] for name in ("prompt_tokens", "completion_tokens")}.items() <= usage.items()
    assert fields["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 < fields["ttft_ms"] < fields["ms"]
    assert list(fields)[:2] == ["status", "ms"]
    if "tokens_per_second" in fields:  # the fake engine may send all tokens at once
        assert fields["tokens_per_second"] > (usage["completion_tokens"] - 2) / (fields["ms"] / 1000)


def test_only_generations_have_tokens(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    httpx.post(server.url + COMPLETIONS, json={"model": "x", "prompt": "Hello"})
    assert set(access_fields(caplog)) == {"status", "ms", "client", "request_id"}


@pytest.mark.checklist("B08", "F01")
def test_a_bug_is_500_without_details(
    server: RunningServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("/secret/path at 0x7f00")

    monkeypatch.setattr(type(server.model.tokenizer), "encode", explode)
    response = httpx.post(server.url + COMPLETIONS, json={"prompt": "hi"})
    error = check_error(response, 500)
    assert (error["type"], error["code"], error["param"]) == ("server_error", None, None)
    assert response.headers["x-request-id"] in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text
    assert "RuntimeError" not in response.text
    assert "secret" in caplog.text


@pytest.mark.parametrize("path", ["/tokenize", "/tokenize\n"])  # the second one is found by the application
def test_an_answer_for_which_there_is_no_memory_is_refused(start_server: StartServer, path: str) -> None:
    server = start_server(max_buffered_bytes=1 << 20)
    response = httpx.post(server.url + path.replace("\n", "%0A"), json={"prompt": "a" * 500_000})
    assert "takes more than" in check_error(response, 400)["message"]


def test_nothing_of_a_request_waits_for_the_garbage_collector(server: RunningServer) -> None:
    def alive() -> list[object]:
        return [each for each in gc.get_objects() if type(each) in (Exchange, Request)]

    earlier = alive()
    gc.disable()
    try:
        for prompt, status in (("Hello", 200), ("a" * 5000, 400)):  # the second one is too long, as a thread finds
            for stream in (False, True):
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "stream": stream}
                assert httpx.post(server.url + COMPLETIONS, json=body).status_code == status
                wait_until(lambda: not [each for each in alive() if not any(each is other for other in earlier)])
    finally:
        gc.enable()


@pytest.mark.checklist("G10")
@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("2", 1), ("0", 0), ("x", 0), ("١", 0), ("", 0)])
def test_retries_are_counted(server: RunningServer, value: str, expected: int) -> None:
    headers = [(b"x-stainless-retry-count", value.encode())]
    httpx.get(server.url + "/health", headers=headers)
    wait_until(lambda: server.metric("http_request_duration_seconds_count", handler="/health", method="GET"))
    assert server.metric("lightwell_retried_requests_total") == expected


@pytest.fixture(scope="module")
def prefixed(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder, settings={"root_path": "/llm", "api_key": ("k",)}) as server:
        yield server


@pytest.mark.checklist("B03")
@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_paths_may_have_the_prefix_of_a_proxy(prefixed: RunningServer, prefix: str) -> None:
    """A proxy may remove it or not; either way the rest of the path decides, also which paths need a key."""
    with httpx.Client(base_url=prefixed.url + prefix, timeout=60) as client:
        for path in filter(is_served, ("/", "/docs", "/assets/app/main.js", "/healthz")):
            assert client.get(path).status_code == 200, path
        assert [client.get(path).status_code for path in ("/v1/models", "/llmv1/models")] == [401, 401]
        client.headers["authorization"] = "Bearer k"
        assert client.get("/v1/models").status_code == 200
        assert client.get("/llmv1/models").status_code == 404
        document = client.get("/openapi.json").json()
        assert document.get("servers") == ([{"url": "/llm"}] if is_served("/openapi.json") else None)
        is_anthropics = client.post("/v1/messages", json={}).json().get("type") == "error"  # its envelope, by the path
        assert is_anthropics == is_served("/v1/messages")


@pytest.mark.parametrize(
    ("trusted", "clients"),
    [
        ((), {"10.1.1.1": "127.0.0.1"}),
        (("10.0.0.0/8",), {"10.1.1.1": "127.0.0.1"}),
        (("127.0.0.0/8",), {"10.1.1.1": "10.1.1.1", "6.6.6.6, 10.1.1.1": "10.1.1.1"}),  # the first is what it claims
        (("127.0.0.0/8", "10.1.0.0/16"), {"6.6.6.6, 9.9.9.9, 10.1.1.1": "9.9.9.9"}),
        (("*",), {"10.1.1.1": "10.1.1.1", "1.2.3.4 status=200": "-", "unknown": "-"}),
    ],
)
def test_only_trusted_proxies_name_the_client(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, trusted: tuple[str, ...], clients: dict[str, str]
) -> None:
    """In the log, and as the tenant."""
    caplog.set_level(logging.INFO)
    server = start_server(forwarded_allow_ips=trusted)
    for forwarded, client in clients.items():
        body, headers = {"model": "tiny", "prompt": "x"}, {"x-forwarded-for": forwarded}
        assert httpx.post(server.url + COMPLETIONS, json=body, headers=headers).status_code == 200
        assert server.engine.submits[-1].tenant == client.strip("-")
        assert access_fields(caplog)["client"] == client
