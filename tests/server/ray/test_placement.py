"""Which replica a request is sent to."""

import json
from collections import Counter
from typing import Any

from server.ray.placement import FREE_LOAD, OPENING_BYTES, opening, ranked

NAMES = ["a", "b", "c"]
IDLE = dict.fromkeys(NAMES, 0)


def chat(*texts: str, **fields: Any) -> bytes:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_all_turns_of_a_conversation_have_the_same_opening() -> None:
    turns = [chat("s", "hello"), chat("s", "hello", "hi", "tell me more", temperature=1)]
    assert opening(turns[0]) == opening(turns[1])


def test_other_conversations_have_others() -> None:
    for other in (
        chat("t", "hello"),
        chat("s", "goodbye"),
        chat("s", "hello", tools=[{}]),
        chat("s", "hello").replace(b'"m"', b'"lora"'),
    ):
        assert opening(other) != opening(chat("s", "hello")), other


def test_long_texts_that_begin_alike_have_the_same_opening() -> None:
    document = "x" * OPENING_BYTES
    assert opening(chat("s", document + "one question")) == opening(chat("s", document + "another question"))
    long_system = "y" * 2 * OPENING_BYTES
    assert opening(chat(long_system, "one")) != opening(chat(long_system, "two"))


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
