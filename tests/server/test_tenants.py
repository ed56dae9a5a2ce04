"""Tenants over real sockets: from a key or an address to the engine, and what belongs to each of them."""

from ipaddress import IPv6Address
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from engine.shared.messages import Submit
from server.tenants import EVERYBODY, Account, Tenant, tenant_of_address
from tests.server.conftest import StartServer
from tests.support.serving import RunningServer

REQUEST = {"model": "tiny", "prompt": "a", "max_tokens": 1}
KEYS = ("key-a", "key-b")


def send(server: RunningServer, key: str | None, method: str, path: str, **options: Any) -> httpx.Response:
    """Send a request with the id `mine`, which any client may choose."""
    headers = {"x-request-id": "mine"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    return httpx.request(method, server.url + path, headers=headers, timeout=20, **options)


def submit(server: RunningServer, key: str | None = None, **fields: Any) -> Submit:
    """Send a request, and return the message that the engine got."""
    assert send(server, key, "POST", "/v1/completions", json=REQUEST | fields).status_code == 200
    return server.engine.submits[-1]


def test_a_request_without_a_key_belongs_to_its_address() -> None:
    account = Account()
    for client, name in ((("10.0.0.7", 4711), "10.0.0.7"), (("::ffff:10.0.0.7", 1), "10.0.0.7"), (None, "")):
        tenant = tenant_of_address({"client": client}, account)
        assert (tenant.name, tenant.owner, tenant.account) == (name, EVERYBODY, account)


@given(network=st.integers(0, 2**64 - 1), hosts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_the_addresses_of_an_ipv6_network_are_one_tenant(network: int, hosts: tuple[int, int]) -> None:
    """Whoever has one address of a /64 has them all."""
    addresses = [network << 64 | host for host in hosts] + [(network ^ 1) << 64 | hosts[0]]
    clients = [{"client": (str(IPv6Address(address)), 1)} for address in addresses]
    first, second, other = (tenant_of_address(client, Account()).name for client in clients)
    # ::/64 holds the addresses of IPv4, each of which is a client.
    assert first == second or network == 0
    assert first != other


def test_the_engine_gets_the_tenant_of_each_request(server: RunningServer, keyed: RunningServer) -> None:
    assert submit(server).tenant == "127.0.0.1"
    assert [submit(keyed, key).tenant for key in ("key-b", "key-a", "key-b")] == ["key-2", "key-1", "key-2"]
    assert submit(keyed, "key-a").weight == 1.0


# Cached prefixes.


def test_tenants_have_caches_of_their_own(
    start_server: StartServer, server: RunningServer, keyed: RunningServer
) -> None:
    together = start_server(api_key=KEYS, isolate_keys=False)
    assert submit(keyed, "key-a").cache_salt != submit(keyed, "key-b").cache_salt
    assert [submit(together, key, cache_salt="s").cache_salt for key in KEYS] == ["s", "s"]
    assert submit(server, cache_salt="s").cache_salt == "s"


NAMES = st.text(st.characters(exclude_characters="\0"), min_size=1)


@given(names=st.tuples(NAMES, NAMES), salts=st.tuples(st.text(), st.text()))
def test_no_salt_leads_to_the_cache_of_another_tenant(names: tuple[str, str], salts: tuple[str, str]) -> None:
    first, second = (Tenant(name=name, has_own_cache=True).salt(salt) for name, salt in zip(names, salts, strict=True))
    assert (first == second) is ((names[0], salts[0]) == (names[1], salts[1]))
