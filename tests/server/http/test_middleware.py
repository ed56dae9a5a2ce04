"""What every request passes, over real sockets: keys, hosts, origins, bodies, ids, logs."""

import gzip
import hashlib
import inspect
import json
import logging
import re
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from server.app import create_app
from server.http import middleware
from server.http.middleware import OPEN_PATHS, BodyMiddleware, choose_request_id, host_of_url
from server.http.protocol import HTTPProtocol
from tests.server.conftest import StartServer
from tests.support.serving import (
    RunningServer,
    check_envelope,
    check_error,
    fresh_server,
    raw_request,
    read_answer,
    wait_until,
)

KEYS = ("key-one", "schlüssel-zwei")
JSON_BODY = b'{"prompt":"hi"}'
JSON_TYPE = {"content_type": "application/json"}


@pytest.fixture(scope="module")
def guarded(model_folder: Path) -> Iterator[RunningServer]:
    with fresh_server(model_folder, api_key=KEYS) as server:
        yield server


# Keys.


GOOD_KEYS = [b"Bearer key-one", b"bearer key-one", b"BEARER   key-one  ", "Bearer schlüssel-zwei".encode()]
BAD_KEYS = [
    (None, None),
    (b"", None),
    (b"Bearer", None),
    (b"Bearer ", None),
    (b"key-one", None),
    (b"Basic key-one", None),
    (b"Bearer key-on", "invalid_api_key"),
    (b"Bearer key-one2", "invalid_api_key"),
    (b"Bearer KEY-ONE", "invalid_api_key"),
    (b"Bearer key-one key-one", "invalid_api_key"),
    (b"Bearer \xff\xfe", "invalid_api_key"),
    ("Bearer schlüssel-zwei".encode("latin-1"), "invalid_api_key"),
    (b"Bearer " + hashlib.sha256(b"key-one").hexdigest().encode(), "invalid_api_key"),
]


def get_with_key(server: RunningServer, value: bytes | None) -> tuple[int, dict[str, str], bytes]:
    field = b"" if value is None else b"authorization: " + value + b"\r\n"
    with server.connect() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + field + b"\r\n")
        return read_answer(connection)


def test_each_key_opens(guarded: RunningServer) -> None:
    for value in GOOD_KEYS:
        assert get_with_key(guarded, value)[0] == 200, value


def test_anything_else_is_401(guarded: RunningServer) -> None:
    for value, code in BAD_KEYS:
        status, headers, body = get_with_key(guarded, value)
        assert status == 401, value
        assert headers["www-authenticate"] == "Bearer"
        error = check_envelope(body)
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        assert b"key-on" not in body


def test_two_keys_at_once_are_no_key(guarded: RunningServer) -> None:
    headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer key-one")]
    check_error(httpx.get(guarded.url + "/v1/models", headers=headers), 401)


def all_routes(routes: Iterable[object]) -> Iterator[Route]:
    """Those of included routers, too."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        else:
            yield from all_routes(route.original_router.routes)  # type: ignore[attr-defined]


def test_every_route_but_the_probes_needs_a_key(guarded: RunningServer) -> None:
    routes = list(all_routes(create_app(guarded.context).routes))
    assert {"/v1/models", "/metrics", "/tokenize"} <= {route.path for route in routes}
    for route in routes:
        path = route.path.replace("{model_id:path}", "tiny")
        for method in route.methods or ():
            response = httpx.request(method, guarded.url + path)
            if route.path in OPEN_PATHS:
                assert response.status_code == 200
            else:
                assert response.status_code == 401, route.path


PATHS = [
    "//v1/models",
    "/v1/../v1/models",
    "/health/../v1/models",
    "/health/",
    "//health",
    "/health%2f..%2fv1/models",
    "/%68ealth%00",
    "/healthz/v1/models",
    "/health;/v1/models",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/",
    "*",
    "http://localhost/health/x",
]


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "FOO"])
def test_no_spelling_of_a_path_passes_without_key(guarded: RunningServer, method: str) -> None:
    for path in PATHS:
        with guarded.connect() as connection:
            connection.sendall(raw_request(method, path, connection="close"))
            status, headers, _ = read_answer(connection)
            assert status == 401, path
            assert "www-authenticate" in headers


@pytest.mark.parametrize("host", ["x/healthz?", "x/health#", "localhost/health", "health"])
def test_the_host_does_not_decide_about_the_key(start_server: StartServer, host: str) -> None:
    server = start_server(api_key=KEYS, allowed_origins=("*",))  # no check of the host itself
    with server.connect() as connection:
        connection.sendall(raw_request("GET", "/v1/models", host=host))
        assert read_answer(connection)[0] == 401


def test_websockets_are_closed_to_all(guarded: RunningServer) -> None:
    with guarded.connect() as connection:
        connection.sendall(raw_request("GET", "/v1/models", upgrade="websocket", connection="upgrade"))
        assert read_answer(connection)[0] == 401


def test_keys_are_compared_in_constant_time() -> None:
    source = inspect.getsource(middleware.AuthMiddleware)
    assert "compare_digest" in source
    assert "==" not in source.split("def _is_known")[1]
    assert "break" not in source


# Hosts and origins.


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "192.168.0.1", "gateway:80"]
)
def test_own_hosts(shared_server: RunningServer, host: str) -> None:
    assert httpx.get(shared_server.url + "/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "["])
def test_foreign_hosts_on_loopback(shared_server: RunningServer, host: str) -> None:
    for path in ("/health", "/v1/models"):
        check_error(httpx.get(shared_server.url + path, headers={"host": host}), 403)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "https://["])
def test_foreign_origins_on_loopback(shared_server: RunningServer, origin: str) -> None:
    check_error(httpx.post(shared_server.url + "/tokenize", json={"prompt": "hi"}, headers={"origin": origin}), 403)


def test_pages_of_this_machine_may_call(shared_server: RunningServer) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:5"):
        response = httpx.post(shared_server.url + "/tokenize", json={"prompt": "hi"}, headers={"origin": origin})
        assert response.status_code == 200


def test_preflight_passes_without_key_only_with_cors(start_server: StartServer) -> None:
    server = start_server(api_key=KEYS, allowed_origins=("https://page.example",))
    headers = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    response = httpx.options(server.url + "/v1/chat/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert response.headers["x-request-id"]
    deleting = headers | {"access-control-request-method": "DELETE"}
    assert httpx.options(server.url + "/v1/responses/resp_1", headers=deleting).status_code == 200
    check_error(httpx.options(server.url + "/v1/models", headers={"origin": "https://page.example"}), 401)

    answer = httpx.get(server.url + "/v1/models", headers={"origin": "https://page.example"})
    check_error(answer, 401)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-request-id", "x-lightwell-seed", "x-lightwell-deterministic"} <= set(exposed.split(", "))


def test_foreign_preflight_is_refused_in_the_envelope(start_server: StartServer) -> None:
    server = start_server(allowed_origins=("https://page.example", "http://localhost:1"))
    headers = {"origin": "http://localhost:2", "access-control-request-method": "POST"}
    check_error(httpx.options(server.url + "/v1/models", headers=headers), 400)


def test_host_of_url() -> None:
    assert host_of_url("//[::1]:80") == "::1"
    assert host_of_url("https://A.b:1") == "a.b"
    assert host_of_url("null") == ""
    assert host_of_url("//[") == ""


# Bodies.


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
    ],
)
def test_other_types_are_415(shared_server: RunningServer, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    check_error(httpx.post(shared_server.url + "/tokenize", content=JSON_BODY, headers=headers), 415)


def test_where_no_route_is_the_type_does_not_matter(shared_server: RunningServer) -> None:
    check_error(httpx.post(shared_server.url + "/nope", content=b"x"), 404)
    check_error(httpx.post(shared_server.url + "/v1/models"), 405)


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_json_is_taken(shared_server: RunningServer, content_type: str) -> None:
    response = httpx.post(shared_server.url + "/tokenize", content=JSON_BODY, headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
def test_compressed_bodies_are_never_inflated(shared_server: RunningServer, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    check_error(httpx.post(shared_server.url + "/tokenize", content=gzip.compress(b"0" * 10**7), headers=headers), 415)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt":NaN}', b"\xff"])
def test_bodies_that_are_no_json_object_are_400(shared_server: RunningServer, body: bytes) -> None:
    response = httpx.post(shared_server.url + "/tokenize", content=body, headers={"content-type": "application/json"})
    error = check_error(response, 400)
    assert (error["code"], error["param"]) == (None, None)
    assert error["message"].startswith("We could not parse the JSON body of your request.")


def test_a_surrogate_is_named_over_http(shared_server: RunningServer) -> None:
    response = httpx.post(
        shared_server.url + "/tokenize", content=b'{"prompt":"\\ud800"}', headers={"content-type": "application/json"}
    )
    assert check_error(response, 400)["param"] == "prompt"


def test_body_over_the_limit_by_content_length(start_server: StartServer) -> None:
    server = start_server(max_body_size=2000)
    fits = json.dumps({"prompt": "x" * 1000}).encode()
    headers = {"content-type": "application/json"}
    assert httpx.post(server.url + "/tokenize", content=fits, headers=headers).status_code == 200
    response = httpx.post(server.url + "/tokenize", content=b" " * 2001, headers=headers)
    assert check_error(response, 413)["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_body_over_the_limit_by_chunks(start_server: StartServer) -> None:
    server = start_server(max_body_size=100_000)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + "/tokenize", content=chunks(), headers=headers)
    check_error(response, 413)


def send_repeatedly(connection: socket.socket, data: bytes, *, seconds: float, pause: float = 0.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        connection.sendall(data)
        time.sleep(pause)


def test_an_endless_body_is_cut(start_server: StartServer) -> None:
    server = start_server(max_body_size=100_000)
    with server.connect() as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        with pytest.raises(OSError):
            send_repeatedly(connection, chunk, seconds=10)


def test_a_client_that_waits_for_100_continue_is_refused_at_once(start_server: StartServer) -> None:
    server = start_server(max_body_size=2000)
    with server.connect() as connection:
        fields = "host: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 99999"
        connection.sendall(f"POST /tokenize HTTP/1.1\r\n{fields}\r\n\r\n".encode())
        start = time.monotonic()
        assert read_answer(connection)[0] == 413
        assert time.monotonic() - start < 0.5


def test_a_body_that_does_not_come_is_408(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BodyMiddleware.__init__, "__defaults__", (0.3,))
    server = start_server()
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/tokenize", content_length="100", **JSON_TYPE) + b"{")
        status, headers, body = read_answer(connection)
        assert status == 408
        assert headers["connection"] == "close"
        check_envelope(body)
        assert connection.recv(1) == b""


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
    with server.connect() as connection:  # an answered connection is idle, not slow
        connection.sendall(raw_request("GET", "/health"))
        assert read_answer(connection)[0] == 200
        time.sleep(0.6)
        connection.sendall(raw_request("GET", "/health"))
        assert read_answer(connection)[0] == 200


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
        status, headers, body = read_answer(connection)
        assert status == 400
        assert headers["connection"] == "close"
        assert headers["x-request-id"]
        check_envelope(body)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("head", [b"x: " + b"a" * 100_000, b"\r\n".join(b"x%d: y" % i for i in range(10_000))])
def test_a_huge_head_is_431(shared_server: RunningServer, head: bytes) -> None:
    with shared_server.connect() as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
            status, _, body = read_answer(connection)
        except ConnectionError:
            return  # closed while we still wrote
        assert status == 431
        check_envelope(body)


def test_pipelined_requests_are_answered_in_order(shared_server: RunningServer) -> None:
    with shared_server.connect() as connection:
        bad = raw_request("POST", "/tokenize", b"{", **JSON_TYPE)
        good = raw_request("POST", "/tokenize", JSON_BODY, **JSON_TYPE)
        connection.sendall(bad + good + raw_request("GET", "/nowhere", connection="close"))
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"400", b"200", b"404"]


def test_a_connection_lives_on_after_refusals(start_server: StartServer) -> None:
    server = start_server(api_key=("k",))
    with server.connect() as connection:
        for fields in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer k", "content_type": "text/plain"}):
            connection.sendall(raw_request("POST", "/tokenize", b"x" * 200_000, **fields))
            assert read_answer(connection)[0] in (401, 415)
        connection.sendall(raw_request("GET", "/v1/models", authorization="Bearer k"))
        assert read_answer(connection)[0] == 200


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(1)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_idle_connections_make_room(start_server: StartServer) -> None:
    server = start_server(server={"max_connections": 20})
    idle = [server.connect() for _ in range(60)]
    try:
        assert httpx.get(server.url + "/health").status_code == 200
        assert all(map(is_closed, idle[:40]))
    finally:
        for connection in idle:
            connection.close()


# Ids and logs.


@pytest.mark.parametrize("given", ["abc", "A.b_c-1", "x" * 128])
def test_a_harmless_request_id_is_kept(shared_server: RunningServer, given: str) -> None:
    assert httpx.get(shared_server.url + "/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a\x1b[31m", "x" * 129, "ü", "a/b", "a\r\nb", "a\n", None])
def test_other_request_ids_are_replaced(given: str | None) -> None:
    chosen = choose_request_id(given)
    assert chosen.startswith("req_")
    assert len(chosen) == 36


def test_every_answer_has_an_id_of_its_own(shared_server: RunningServer) -> None:
    responses = [httpx.get(shared_server.url + path) for path in ("/health", "/nowhere", "/v1/models", "/metrics") * 2]
    assert len({response.headers["x-request-id"] for response in responses}) == 8


def test_one_line_for_each_request(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with server.connect() as connection:
        connection.sendall(raw_request("GET", "/x%0a%1b[31m?key=secret", x_request_id="mine", connection="close"))
        assert read_answer(connection)[0] == 404
    wait_until(lambda: [r for r in caplog.records if r.name == "server.access"])
    (record,) = [record for record in caplog.records if record.name == "server.access"]
    assert record.getMessage() == "GET /x\n\x1b[31m"  # escaped by the formatter
    fields = record.__dict__["fields"]
    assert fields["request_id"] == "mine"
    assert fields["status"] == 404
    assert fields["client"] == "127.0.0.1"
    assert "secret" not in str(record.__dict__)


def test_what_is_asked_for_all_the_time_is_logged_for_debugging(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for path in ("/health", "/healthz", "/readyz", "/metrics", "/v1/models"):
        assert httpx.get(server.url + path).status_code == 200
    wait_until(lambda: len([r for r in caplog.records if r.name == "server.access"]) == 5)
    levels = [record.levelname for record in caplog.records if record.name == "server.access"]
    assert levels == ["DEBUG"] * 4 + ["INFO"]


def test_a_bug_is_500_without_details(
    server: RunningServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("/secret/path at 0x7f00")

    monkeypatch.setattr(type(server.context.tokenizer), "encode", explode)
    response = httpx.post(server.url + "/tokenize", json={"prompt": "hi"})
    error = check_error(response, 500)
    assert (error["type"], error["code"], error["param"]) == ("server_error", None, None)
    assert response.headers["x-request-id"] in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text
    assert "RuntimeError" not in response.text
    assert "secret" in caplog.text


def test_http_metrics_count_routes_and_not_paths(server: RunningServer) -> None:
    for path in ("/v1/models/tiny", "/v1/models/org/tiny", "/a", "/b"):
        httpx.get(server.url + path)
    httpx.request("BREW", server.url + "/c")
    registry = server.context.metrics.registry

    def count(handler: str, method: str, status: str) -> float | None:
        labels = {"handler": handler, "method": method, "status": status}
        return registry.get_sample_value("http_requests_total", labels)

    wait_until(lambda: count("none", "other", "404"))
    assert count("/v1/models/{model_id:path}", "GET", "200") == 2
    assert count("none", "GET", "404") == 2


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("2", 1), ("0", 0), ("x", 0), ("١", 0), ("", 0)])
def test_retries_are_counted(server: RunningServer, value: str, expected: int) -> None:
    headers = [(b"x-stainless-retry-count", value.encode())]
    httpx.get(server.url + "/health", headers=headers)
    wait_until(lambda: server.metric("http_request_duration_seconds_count", handler="/health", method="GET"))
    assert server.metric("lightwell_retried_requests_total") == expected
