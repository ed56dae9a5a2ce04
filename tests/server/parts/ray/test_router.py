"""The request router, with replicas of which only ids and loads are known."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from server.parts.ray.router import FREE_LOAD, ForwardedRequest, PrefixRouter, ranked

pytestmark = pytest.mark.long

DEPLOYMENT = DeploymentID("Lightwell")
NAMES = ["a", "b", "c"]


def chosen(opening: bytes | None, replica: str | None = None, loads: dict[str, int] | None = None) -> list[str]:
    """Return the replicas that a router tries, in this order."""
    ids = {name: ReplicaID(name, DEPLOYMENT) for name in NAMES}
    candidates = [cast(RunningReplica, SimpleNamespace(replica_id=ids[name])) for name in NAMES]
    request = ForwardedRequest("POST", b"/", [], b"", opening, replica)

    async def choose() -> list[list[RunningReplica]]:
        router = PrefixRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        for name, load in (loads or {}).items():
            router.on_new_queue_len_info(ids[name], load)
        metadata: Any = None
        pending = PendingRequest([request], {}, metadata)
        found = await router.choose_replicas(candidates, pending)
        assert pending.routing_context.should_backoff
        return found

    return [replica.replica_id.unique_id for (replica,) in asyncio.run(choose())]


def test_the_opening_decides() -> None:
    assert chosen(b"x") == ranked(b"x", dict.fromkeys(NAMES, 0))


def test_load_that_serve_knows_counts() -> None:
    first = chosen(b"x")[0]
    assert chosen(b"x", loads={first: FREE_LOAD - 1})[0] == first
    assert chosen(b"x", loads={first: FREE_LOAD})[-1] == first
    assert chosen(None, loads={"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


def test_a_request_can_name_its_replica() -> None:
    assert [chosen(b"x", replica=name) for name in NAMES] == [[name] for name in NAMES]
    assert chosen(b"x", replica="gone") == chosen(b"x")
