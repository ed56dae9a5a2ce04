"""Which replica a request is sent to: by its opening, and by the router, with replicas of which loads are known."""

import asyncio
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from server.parts.ray.replica import FREE_LOAD, OPENING_BYTES, ForwardedRequest, PrefixRouter, opening, ranked

NAMES = ["a", "b", "c"]
IDLE = dict.fromkeys(NAMES, 0)


def chat(*texts: str, **fields: Any) -> bytes:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_openings_of_chats() -> None:
    """All turns of a conversation have the same one, and so have long texts that begin alike."""
    first, document = chat("s", "hello"), "x" * OPENING_BYTES
    for one, other, is_same in (
        (first, chat("s", "hello", "hi", "tell me more", temperature=1), True),
        (first, chat("t", "hello"), False),
        (first, chat("s", "goodbye"), False),
        (first, chat("s", "hello", tools=[{}]), False),
        (first, first.replace(b'"m"', b'"lora"'), False),
        (chat("s", document + "one question"), chat("s", document + "another question"), True),
        (chat(document * 2, "one"), chat(document * 2, "two"), False),
    ):
        assert (opening(one) == opening(other)) == is_same, other[:200]


def test_prompts_of_all_apis() -> None:
    for fields, others in (
        ({"prompt": "once"}, {"prompt": "twice"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        ({"input": "once"}, {"input": "twice"}),
        ({"input": [{"role": "user", "content": "once"}]}, {"input": [{"role": "user", "content": "twice"}]}),
        ({"input": "once", "instructions": "x"}, {"input": "once", "instructions": "y"}),
        ({"system": "x", "messages": []}, {"system": [{"type": "text", "text": "y"}], "messages": []}),
    ):
        bodies = [json.dumps({"model": "m"} | each).encode() for each in (fields, fields, others)]
        same, again, different = map(opening, bodies)
        assert same is not None
        assert same == again != different


def test_bodies_without_a_prompt() -> None:
    for body in (b"", b"{", b"[]", b'{"model": "m"}', b'{"messages": 5}', b'{"messages": [1]}', b"\xff"):
        assert opening(body) is None, body


def test_openings_are_spread_over_the_replicas() -> None:
    first = Counter(ranked(str(number).encode(), IDLE)[0] for number in range(3000))
    assert all(900 < first[name] < 1100 for name in NAMES)


def test_a_new_replica_takes_its_share_and_moves_nothing_else() -> None:
    for number in range(300):
        before, after = (ranked(str(number).encode(), loads)[0] for loads in (IDLE, IDLE | {"d": 0}))
        assert after in (before, "d")


def test_a_replica_that_is_busier_than_the_others_is_passed_over() -> None:
    first, second, third = ranked(b"x", IDLE)
    assert ranked(b"x", IDLE | {first: FREE_LOAD - 1})[0] == first
    assert ranked(b"x", IDLE | {first: FREE_LOAD}) == [second, third, first]
    busy = dict.fromkeys(NAMES, 100)
    assert ranked(b"x", busy | {first: 110})[0] == first
    assert ranked(b"x", busy | {first: 200}) == [second, third, first]
    assert ranked(b"x", {first: 300, second: 400, third: 0}) == [third, first, second]


def test_without_an_opening_the_least_busy_comes_first() -> None:
    assert ranked(None, {"a": 2, "b": 0, "c": 1}) == ["b", "c", "a"]


DEPLOYMENT = DeploymentID("Lightwell")


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


@pytest.mark.long
def test_the_opening_decides() -> None:
    assert chosen(b"x") == ranked(b"x", dict.fromkeys(NAMES, 0))


@pytest.mark.long
def test_load_that_serve_knows_counts() -> None:
    first = chosen(b"x")[0]
    assert chosen(b"x", loads={first: FREE_LOAD - 1})[0] == first
    assert chosen(b"x", loads={first: FREE_LOAD})[-1] == first
    assert chosen(None, loads={"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


@pytest.mark.long
def test_a_request_can_name_its_replica() -> None:
    assert [chosen(b"x", replica=name) for name in NAMES] == [[name] for name in NAMES]
    assert chosen(b"x", replica="gone") == chosen(b"x")
