"""API keys, hosts and origins, over real sockets."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Mount, Route

from server.http.access_control import OPEN_PATHS
from server.part_table import missing_part
from server.tenants import ApiKeys
from tests.server.conftest import StartServer
from tests.support.serving import RunningServer, check_envelope, check_error, fresh_server, raw_request, read_response
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
    (b"Bearer wrong\r\nauthorization: Bearer key-one", None),  # two keys at once are no key
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
def test_each_key_opens_and_anything_else_is_401(guarded: RunningServer) -> None:
    for key in GOOD_KEYS:
        assert get_with_key(guarded, key)[0] == 200, key
    for value, code in BAD_KEYS:
        status, headers, body = get_with_key(guarded, value)
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), value
        error = check_envelope(body)
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        message = error["message"]
        assert message.startswith("You didn't provide an API key." if code is None else "Incorrect API key provided.")
        assert "Authorization: Bearer YOUR_KEY" in message
        assert "x-api-key" in message
        assert ("does not begin with 'Bearer '" in message) == (value in (b"key-one", b"Basic key-one")), value
        assert "key-on" not in message


def all_routes(routes: Iterable[object]) -> Iterator[Route]:
    """Yield all routes, including those of included routers."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        elif not isinstance(route, Mount):
            yield from all_routes(route.original_router.routes)  # type: ignore[attr-defined]


@pytest.mark.checklist("B02", "B06")
def test_every_route_but_probes_and_pages_needs_a_key(guarded: RunningServer) -> None:
    routes = list(all_routes(guarded.app.routes))
    assert {"/v1/models", "/metrics", "/v1/completions"} <= {route.path for route in routes}
    for route in routes:
        path = route.path.replace("{model_id:path}", "tiny")
        for method in route.methods or ():
            status = httpx.request(method, guarded.url + path).status_code
            assert status == (200 if route.path in OPEN_PATHS else 401), route.path


PATHS = """//v1/models /v1/../v1/models /health/../v1/models /health/ //health /health%2f..%2fv1/models /%68ealth%00
    /healthz/v1/models /health;/v1/models /docs/ //docs /assets /openapi.json /redoc * http://localhost/health/x"""


@pytest.mark.checklist("A13", "B03")
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "FOO"])
def test_no_spelling_of_a_path_passes_without_key(guarded: RunningServer, method: str) -> None:
    for path in PATHS.split():
        with guarded.connect() as connection:
            connection.sendall(raw_request(method, path, connection="close"))
            status, headers, _ = read_response(connection)
            assert status == 401, path
            assert "www-authenticate" in headers


@pytest.mark.checklist("B03")
def test_neither_the_host_nor_an_upgrade_decides_about_the_key(start_server: StartServer) -> None:
    server = start_server(api_key=KEYS, allowed_origins=("*",))  # disables the check of the host
    upgrade = {"upgrade": "websocket", "connection": "upgrade"}
    for fields in (*({"host": host} for host in ("x/healthz?", "x/health#", "localhost/health", "health")), upgrade):
        with server.connect() as connection:
            connection.sendall(raw_request("GET", "/v1/models", **fields))
            assert read_response(connection)[0] == 401


@pytest.mark.checklist("B04")
def test_keys_are_compared_in_constant_time() -> None:
    source = inspect.getsource(ApiKeys.find)
    assert "compare_digest" in source
    assert "==" not in source
    assert "break" not in source


REQUESTS = [
    ("GET", "/metrics", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/etc/passwd"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/none"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"}),
]
ADMIN_REQUESTS = [request for request in REQUESTS if missing_part(request[1]) is None]
ALLOWED, FORBIDDEN, UNKNOWN = [200, 400, 400, 404], [403] * 4, [401] * 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {None: ALLOWED}),
        ({"api_key": ("a",)}, {"a": ALLOWED}),
        ({"api_key": ("a", "b"), "one_tenant": True}, {"b": ALLOWED}),
        ({"api_key": ("a", "b")}, {"b": FORBIDDEN}),
        ({"api_key": ("a", "b"), "public_metrics": True}, {"b": [200, *FORBIDDEN[1:]], None: [200, *UNKNOWN[1:]]}),
        ({"api_key": ("a",), "admin_key": "root"}, {"a": FORBIDDEN, "root": ALLOWED, None: UNKNOWN}),
    ],
)
def test_what_concerns_all_needs_an_admin_key(
    start_server: StartServer, settings: dict[str, object], expected: dict[str | None, list[int]]
) -> None:
    server = start_server(allow_runtime_lora_updating=True, **settings)
    for key, statuses in expected.items():
        for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}) if key else ({},):
            answers = [
                httpx.request(method, server.url + path, json=body, headers=header)
                for method, path, body in ADMIN_REQUESTS
            ]
            assert [answer.status_code for answer in answers] == statuses[: len(answers)]
            for answer in answers:
                if answer.status_code == 403:
                    message = check_error(answer, 403)["message"]
                    assert message == "This needs an admin key of the server; the key of your request is none."


# Hosts and origins.


def test_hosts_and_origins_on_loopback(server: RunningServer) -> None:
    """Pages of this machine may call."""
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "192.168.0.1", "gateway:80"):
        response = httpx.get(server.url + "/health", headers={"host": host})
        assert (response.status_code, response.headers["vary"]) == (200, "Origin"), host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "["):
        for path in ("/health", "/v1/models"):
            check_error(httpx.get(server.url + path, headers={"host": host}), 403)

    def post(origin: str) -> httpx.Response:
        return httpx.post(server.url + "/v1/completions", json={"prompt": "hi"}, headers={"origin": origin})

    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:5"):
        assert post(origin).status_code == 200, origin
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "https://["):
        check_error(post(origin), 403)


def test_a_foreign_host_names_the_flag_that_allows_it(server: RunningServer, start_server: StartServer) -> None:
    headers = {"host": "box.example:8000"}
    error = check_error(httpx.get(server.url + "/v1/models", headers=headers), 403)
    flag, _, origin = error["message"].partition("; ")[2].removesuffix(" allows it.").partition(" ")
    assert flag == "--allowed-origins"
    open_server = start_server(allowed_origins=settings_from_flags(flag, origin).allowed_origins)
    assert httpx.get(open_server.url + "/v1/models", headers=headers).status_code == 200
    error = check_error(httpx.get(open_server.url + "/v1/models", headers={"host": "["}), 403)
    assert error["message"] == "The Host header of your request is invalid."


def test_preflight_passes_without_key_only_with_cors(start_server: StartServer) -> None:
    page = {"origin": "https://page.example"}
    server = start_server(api_key=KEYS, allowed_origins=("https://page.example",))
    for method, path in (("POST", "/v1/chat/completions"), ("DELETE", "/v1/responses/resp_1")):
        asked = {
            "access-control-request-method": method,
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        response = httpx.options(server.url + path, headers=page | asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        assert response.headers["x-request-id"]
    check_error(httpx.options(server.url + "/v1/models", headers=page), 401)
    answer = httpx.get(server.url + "/v1/models", headers=page)
    check_error(answer, 401)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-request-id", "x-lightwell-seed", "x-lightwell-deterministic"} <= set(exposed.split(", "))


ONE_PAGE = {"allowed_origins": ("http://localhost:1",)}
OUTSIDE = {"host": "0.0.0.0"}


@pytest.mark.parametrize(
    ("settings", "origin", "method", "status", "part"),
    [
        ({}, "https://page.example", "POST", 403, "--allowed-origins https://page.example allows it"),
        ({}, "null", "POST", 403, "--allowed-origins '*'"),
        ({}, "http://localhost:3000", "POST", 400, "--allowed-origins http://localhost:3000 allows it"),
        (OUTSIDE, "https://page.example", "POST", 400, "--allowed-origins https://page.example allows it"),
        (ONE_PAGE, "http://localhost:2", "POST", 400, "--allowed-origins http://localhost:2 allows it"),
        (ONE_PAGE, "http://localhost:1", "PUT", 400, "the methods GET, POST and DELETE"),
    ],
)
def test_a_preflight_that_is_refused_names_what_is_allowed(
    start_server: StartServer, settings: dict[str, object], origin: str, method: str, status: int, part: str
) -> None:
    server = start_server(api_key=KEYS, **settings)
    headers = {"origin": origin, "access-control-request-method": method}
    assert part in check_error(httpx.options(server.url + "/v1/models", headers=headers), status)["message"]
