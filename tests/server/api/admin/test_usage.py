"""What a client has used, at `/v1/usage` and in the metrics."""

from pathlib import Path
from typing import Any

import httpx

from server.metrics import exposition
from tests.server.conftest import StartServer
from tests.support.clients import write_keys_file
from tests.support.serving import RunningServer

REQUEST = {"model": "tiny", "prompt": "abcd", "max_tokens": 2}


def ask(server: RunningServer, key: str = "none", **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.url + "/v1/completions", json=REQUEST | fields, headers=headers)


def usage(server: RunningServer, key: str = "none") -> dict[str, Any]:
    (entry,) = httpx.get(server.url + "/v1/usage", headers={"authorization": f"Bearer {key}"}).json()["data"]
    return dict(entry)


def test_usage_of_each_tenant(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(api_keys_file=str(write_keys_file(tmp_path, tokens_per_day=99)))
    for key in ("a", "a", "b", "none"):
        ask(server, key)
    for tenant, key, num_requests in (("alice", "a", 2), ("bob", "b", 1)):
        assert server.metric("lightwell_tenant_requests_total", tenant=tenant) == num_requests
        assert server.metric("lightwell_tenant_prompt_tokens_total", tenant=tenant) == 4 * num_requests
        assert server.metric("lightwell_tenant_generation_tokens_total", tenant=tenant) == 2 * num_requests
        own = usage(server, key)
        assert (own["name"], own["num_requests"], own["total_tokens_today"]) == (tenant, num_requests, 6 * num_requests)
        assert own["limits"]["tokens_per_day"] == (99 if key == "a" else None)


def test_usage_without_keys_is_that_of_all(start_server: StartServer) -> None:
    server = start_server()
    assert ask(server, priority=-9).headers.get("x-lightwell-warnings") is None
    assert usage(server) | {"limits": None} == {
        "object": "usage",
        "name": None,
        "num_requests": 1,
        "num_running_requests": 0,
        "prompt_tokens": 4,
        "cached_tokens": 0,
        "completion_tokens": 2,
        "total_tokens_today": 6,
        "limits": None,
    }
    assert b"tenant=" not in exposition([server.context.metrics])[0]


def test_an_admin_sees_all(start_server: StartServer) -> None:
    server = start_server(api_key=("a", "b"), admin_key="root")
    ask(server, "a")
    answer = httpx.get(server.url + "/v1/usage", headers={"authorization": "Bearer root"}).json()
    assert [(entry["name"], entry["num_requests"]) for entry in answer["data"]] == [
        ("key-1", 1),
        ("key-2", 0),
        ("admin", 0),
    ]
    assert usage(server, "b")["name"] == "key-2"
