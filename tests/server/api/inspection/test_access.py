"""Who may read the engine's records, over real sockets."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.serving import RunningServer, check_error, make_test_context, running_server

KEYS = {"api_key": ("key-a", "key-b"), "admin_key": "root"}
BEYOND = {"host": "0.0.0.0", "allow_unauthenticated": True}
PAGE = "https://page.example"


def read(server: RunningServer, key: str = "", path: str = "steps", **headers: str) -> httpx.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        fields["authorization"] = f"Bearer {key}"
    return httpx.get(f"{server.url}/lightwell/v1/{path}", headers=fields)


PATHS = ("steps", "queue", "blocks", "trace", "requests", "requests/mine", "requests/mine/trace", "events")


def test_it_can_be_turned_off(start_server: StartServer) -> None:
    closed = start_server(inspect=False)
    public = start_server(inspect=False, inspect_public=True, **KEYS)
    for path in PATHS:
        assert check_error(read(closed, path=path), 404)["code"] == "not_enabled"
        assert check_error(read(public, "root", path), 404)["code"] == "not_enabled"
    check_error(httpx.post(f"{closed.url}/lightwell/v1/inspect", json={"prompt": "a"}), 404)


def test_on_loopback_without_keys_everybody_reads(server: RunningServer) -> None:
    assert read(server).status_code == 200
    assert read(server, origin="http://localhost:3000").status_code == 200


def test_not_through_a_proxy(server: RunningServer, start_server: StartServer, keyed: RunningServer) -> None:
    public = start_server(inspect_public=True)
    for header in ("forwarded", "X-Forwarded-For", "x_forwarded_proto", "via", "cf-connecting-ip"):
        message = check_error(read(server, **{header: "for=10.0.0.1"}), 403)["message"]
        assert header.lower().replace("_", "-") in message
        assert "--inspect-public" in message
        assert read(public, **{header: "for=10.0.0.1"}).status_code == 200
        assert read(keyed, "key-a", **{header: "for=10.0.0.1"}).status_code == 200


@pytest.mark.parametrize("settings", [{"allowed_origins": ("*",)}, {"allowed_origins": (PAGE, "*")}, BEYOND])
def test_not_where_others_may_be(start_server: StartServer, settings: dict[str, Any]) -> None:
    closed = start_server(**settings)
    for path in PATHS:
        assert "--inspect-public" in check_error(read(closed, path=path), 403)["message"]
    assert read(start_server(inspect_public=True, **settings)).status_code == 200
    assert read(start_server(**KEYS, **settings), "key-a").status_code == 200


@pytest.mark.parametrize("settings", [{}, {"allowed_origins": ("*",)}, BEYOND])
def test_hosts_and_origins_are_checked_even_if_it_is_public(
    start_server: StartServer, settings: dict[str, Any]
) -> None:
    server = start_server(inspect_public=True, **settings)
    for headers in ({"host": "rebound.example"}, {"origin": PAGE}, {"origin": "null"}):
        check_error(read(server, **headers), 403)
    for headers in ({"host": "192.0.2.7:8000"}, {"host": "my-machine"}, {"origin": f"http://localhost:{server.port}"}):
        assert read(server, **headers).status_code == 200


def test_pages_of_other_sites_start_no_work(server: RunningServer) -> None:
    """A browser sends such requests for images and links, without an Origin."""
    for path in ("steps", "trace", "events", "requests/mine"):
        check_error(read(server, path=path, sec_fetch_site="cross-site", sec_fetch_mode="no-cors"), 403)
    for site in ("none", "same-origin", "same-site"):
        assert read(server, sec_fetch_site=site).status_code == 200
    page = "http://127.0.0.1:3000"  # may read, and is another site than localhost
    assert read(server, origin=page, sec_fetch_site="cross-site").status_code == 200


@pytest.mark.parametrize("settings", [{"allowed_origins": ("*",), "inspect_public": True}, KEYS])
def test_a_file_may_not_read_without_a_host(start_server: StartServer, settings: dict[str, Any]) -> None:
    server = start_server(**settings)
    with server.connect() as connection:
        headers = "Origin: null\r\nAuthorization: Bearer key-a\r\n"
        connection.sendall(f"GET /lightwell/v1/steps HTTP/1.0\r\n{headers}\r\n".encode())
        with connection.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"403"


def test_named_origins_may_read(start_server: StartServer) -> None:
    server = start_server(allowed_origins=(PAGE,))
    assert read(server, origin=PAGE).status_code == 200
    assert read(server, host="page.example").status_code == 200
    check_error(read(server, origin="https://other.example"), 403)


def test_with_keys_a_page_of_the_server_itself_may_read(start_server: StartServer) -> None:
    server = start_server(allowed_origins=("*",), **KEYS)
    assert read(server, "key-a", host="ai.example", origin="https://ai.example").status_code == 200
    check_error(read(server, "key-a", host="ai.example", origin=PAGE), 403)
    check_error(read(server, host="ai.example"), 401)


def test_there_is_nothing_to_read_until_the_engine_is_ready(address: str, model_folder: Path) -> None:
    context = make_test_context(address, model_folder)
    with (
        FakeEngine(FakeEngineConfig(address=address, never_ready=True)) as engine,
        running_server(context, engine, wait_ready=False) as server,
    ):
        check_error(read(server), 503)
