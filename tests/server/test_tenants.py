"""The tenant of each request, from its key or address to the engine."""

import httpx

from engine.shared.messages import Submit
from server.tenants import Tenant, tenant_of_address
from tests.server.conftest import StartServer
from tests.support.serving import RunningServer

REQUEST = {"model": "tiny", "prompt": "a", "max_tokens": 1}


def test_a_request_without_a_key_belongs_to_its_address() -> None:
    assert tenant_of_address({"client": ("10.0.0.7", 4711)}) == Tenant(name="10.0.0.7")
    assert tenant_of_address({"client": None}) == Tenant(name="")


def submit(server: RunningServer, key: str | None = None) -> Submit:
    """Send a request, and return the message that the engine got."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    assert httpx.post(server.url + "/v1/completions", json=REQUEST, headers=headers).status_code == 200
    return server.engine.submits[-1]


def test_the_engine_gets_the_tenant_of_each_request(start_server: StartServer) -> None:
    assert submit(start_server()).tenant == "127.0.0.1"
    server = start_server(api_key=("key-one", "key-two"))
    assert [submit(server, key).tenant for key in ("key-two", "key-one", "key-two")] == ["key-2", "key-1", "key-2"]
    assert submit(server, "key-one").weight == 1.0
