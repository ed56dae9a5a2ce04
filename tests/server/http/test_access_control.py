"""API keys, hosts and origins, over real sockets."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Mount, Route

from server.access.api_keys import ApiKeys
from server.app import create_app
from server.http.access_control import OPEN_PATHS, host_of_url
from tests.server.conftest import StartServer
from tests.support.serving import (
    RunningServer,
    check_envelope,
    check_error,
    fresh_server,
    raw_request,
    read_response,
)
from tests.support.settings_cases import settings_from_flags

KEYS = ("key-one", "schlüssel-zwei")


@pytest.fixture(scope="module")
def guarded(model_folder: Path) -> Iterator[RunningServer]:
    with fresh_server(model_folder, api_key=KEYS) as server:
        yield server


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
        return read_response(connection)


@pytest.mark.checklist("B01")
def test_each_key_opens(guarded: RunningServer) -> None:
    for value in GOOD_KEYS:
        assert get_with_key(guarded, value)[0] == 200, value


@pytest.mark.checklist("B01")
def test_anything_else_is_401(guarded: RunningServer) -> None:
    for value, code in BAD_KEYS:
        status, headers, body = get_with_key(guarded, value)
        assert status == 401, value
        assert headers["www-authenticate"] == "Bearer"
        error = check_envelope(body)
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        assert b"key-on" not in body


def test_a_401_names_the_missing_scheme(guarded: RunningServer) -> None:
    hint = "does not begin with 'Bearer '"
    for value, code in BAD_KEYS:
        message = check_envelope(get_with_key(guarded, value)[2])["message"]
        assert (hint in message) == (value in (b"key-one", b"Basic key-one")), value
        assert message.startswith("You didn't provide an API key." if code is None else "Incorrect API key provided.")


@pytest.mark.checklist("B01")
def test_two_keys_at_once_are_no_key(guarded: RunningServer) -> None:
    headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer key-one")]
    check_error(httpx.get(guarded.url + "/v1/models", headers=headers), 401)


def all_routes(routes: Iterable[object]) -> Iterator[Route]:
    """Yield all routes, including those of included routers."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        elif not isinstance(route, Mount):
            yield from all_routes(route.original_router.routes)  # type: ignore[attr-defined]


@pytest.mark.checklist("B02", "B06")
def test_every_route_but_probes_and_pages_needs_a_key(guarded: RunningServer) -> None:
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
    "/docs/",
    "//docs",
    "/assets",
    "/openapi.json",
    "/redoc",
    "*",
    "http://localhost/health/x",
]


@pytest.mark.checklist("A13", "B03")
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "FOO"])
def test_no_spelling_of_a_path_passes_without_key(guarded: RunningServer, method: str) -> None:
    for path in PATHS:
        with guarded.connect() as connection:
            connection.sendall(raw_request(method, path, connection="close"))
            status, headers, _ = read_response(connection)
            assert status == 401, path
            assert "www-authenticate" in headers


@pytest.mark.checklist("B03")
def test_the_host_does_not_decide_about_the_key(start_server: StartServer) -> None:
    server = start_server(api_key=KEYS, allowed_origins=("*",))  # disables the check of the host
    for host in ("x/healthz?", "x/health#", "localhost/health", "health"):
        with server.connect() as connection:
            connection.sendall(raw_request("GET", "/v1/models", host=host))
            assert read_response(connection)[0] == 401


def test_websockets_are_closed_to_all(guarded: RunningServer) -> None:
    with guarded.connect() as connection:
        connection.sendall(raw_request("GET", "/v1/models", upgrade="websocket", connection="upgrade"))
        assert read_response(connection)[0] == 401


@pytest.mark.checklist("B04")
def test_keys_are_compared_in_constant_time() -> None:
    source = inspect.getsource(ApiKeys.find)
    assert "compare_digest" in source
    assert "==" not in source
    assert "break" not in source


ADMIN_REQUESTS = [
    ("GET", "/metrics", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/etc/passwd"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/none"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"}),
]


def statuses(server: RunningServer, key: str | None) -> list[int]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return [
        httpx.request(method, server.url + path, json=body, headers=headers).status_code
        for method, path, body in ADMIN_REQUESTS
    ]


def test_what_concerns_all_needs_an_admin_key(start_server: StartServer) -> None:
    server = start_server(api_key=KEYS[:1], admin_key="root", allow_runtime_lora_updating=True)
    assert statuses(server, "key-one") == [403] * 4
    assert statuses(server, "root") == [200, 400, 400, 404]
    assert statuses(server, None) == [401] * 4
    for method, path, body in ADMIN_REQUESTS:
        answer = httpx.request(method, server.url + path, json=body, headers={"x-api-key": "key-one"})
        message = check_error(answer, 403)["message"]
        assert message == "This needs an admin key of the server; the key of your request is none."


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {None: [200, 400, 400, 404]}),
        ({"api_key": KEYS[:1]}, {KEYS[0]: [200, 400, 400, 404]}),
        ({"api_key": ("a", "b"), "one_tenant": True}, {"b": [200, 400, 400, 404]}),
        ({"api_key": ("a", "b")}, {"b": [403] * 4}),
        ({"api_key": ("a", "b"), "public_metrics": True}, {"b": [200, 403, 403, 403], None: [200, 401, 401, 401]}),
    ],
)
def test_who_is_an_admin(
    start_server: StartServer, settings: dict[str, object], expected: dict[str | None, list[int]]
) -> None:
    server = start_server(allow_runtime_lora_updating=True, **settings)
    assert {key: statuses(server, key) for key in expected} == expected


# Hosts and origins.


def test_hosts_on_loopback(server: RunningServer) -> None:
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "192.168.0.1", "gateway:80"):
        assert httpx.get(server.url + "/health", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "["):
        for path in ("/health", "/v1/models"):
            check_error(httpx.get(server.url + path, headers={"host": host}), 403)


def test_a_foreign_host_names_the_flag_that_allows_it(server: RunningServer, start_server: StartServer) -> None:
    headers = {"host": "box.example:8000"}
    error = check_error(httpx.get(server.url + "/v1/models", headers=headers), 403)
    flag, _, origin = error["message"].partition("; ")[2].removesuffix(" allows it.").partition(" ")
    assert flag == "--allowed-origins"
    open_server = start_server(allowed_origins=settings_from_flags(flag, origin).allowed_origins)
    assert httpx.get(open_server.url + "/v1/models", headers=headers).status_code == 200
    error = check_error(httpx.get(open_server.url + "/v1/models", headers={"host": "["}), 403)
    assert error["message"] == "The Host header of your request is invalid."


def test_origins_on_loopback(server: RunningServer) -> None:
    """Pages of this machine may call."""

    def post(origin: str) -> httpx.Response:
        return httpx.post(server.url + "/tokenize", json={"prompt": "hi"}, headers={"origin": origin})

    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:5"):
        assert post(origin).status_code == 200, origin
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "https://["):
        check_error(post(origin), 403)


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
    error = check_error(httpx.options(server.url + "/v1/models", headers=headers), 400)
    assert "--allowed-origins http://localhost:2 allows it" in error["message"]
    headers = {"origin": "http://localhost:1", "access-control-request-method": "PUT"}
    error = check_error(httpx.options(server.url + "/v1/models", headers=headers), 400)
    assert "the methods GET, POST and DELETE" in error["message"]


def test_a_preflight_names_the_flag(guarded: RunningServer, start_server: StartServer) -> None:
    outside = start_server(host="0.0.0.0", api_key=KEYS)
    for server, origin, status, value in (
        (guarded, "https://page.example", 403, "https://page.example"),
        (guarded, "null", 403, "'*'"),
        (guarded, "http://localhost:3000", 400, "http://localhost:3000"),
        (outside, "https://page.example", 400, "https://page.example"),
    ):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        error = check_error(httpx.options(server.url + "/v1/models", headers=headers), status)
        assert f"--allowed-origins {value}" in error["message"]


def test_host_of_url() -> None:
    assert host_of_url("//[::1]:80") == "::1"
    assert host_of_url("https://A.b:1") == "a.b"
    assert host_of_url("null") == ""
    assert host_of_url("//[") == ""
