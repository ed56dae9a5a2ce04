"""What vLLM adds to answers: token ids, log probabilities of the prompt, and prompts that are cut to a length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import StartServer
from tests.support.clients import (
    CHAT,
    COMPLETIONS,
    ask,
    ask_json,
    ask_stream,
    finish_reasons,
    shared_server,
    stream_texts,
)
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.support.serving import RunningServer, check_error

BOTH = (COMPLETIONS, CHAT)
REPLY = [*b"Hello, world!"]
MAX_MODEL_LEN = 2048


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder) as server:
        yield server


def prompt_ids(server: RunningServer) -> list[int]:
    """Of the last request, as the engine got it."""
    return list(server.engine.submits[-1].prompt_token_ids)


# return_token_ids


@pytest.mark.parametrize("path", BOTH)
def test_nothing_is_added_unless_asked_for(server: RunningServer, path: str) -> None:
    for fields in ({}, {"return_token_ids": False, "prompt_logprobs": None}):
        answers = [ask_json(server.url, path, **fields), *ask_stream(server.url, path, **fields)]
        for answer in answers:
            for place in (answer, *answer["choices"]):
                assert not {"token_ids", "prompt_token_ids", "prompt_logprobs"} & place.keys()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [*REPLY, EOS_TOKEN_ID]),
        ({"max_tokens": 3}, REPLY[:3]),
        ({"stop": "lo,"}, REPLY[:6]),
        ({"stop": "o"}, REPLY[:5]),
    ],
)
def test_token_ids_are_those_that_the_usage_counts(
    server: RunningServer, fields: dict[str, Any], expected: list[int]
) -> None:
    """In streams those of all chunks together; the prompt's come once for each choice."""
    fields = fields | {"return_token_ids": True, "n": 2}
    for path in BOTH:
        answer = ask_json(server.url, path, **fields)
        prompt = prompt_ids(server)
        assert [choice["token_ids"] for choice in answer["choices"]] == [expected] * 2
        assert answer["usage"]["completion_tokens"] == 2 * len(expected)
        places = answer["choices"] if path == COMPLETIONS else [answer]
        assert [place["prompt_token_ids"] for place in places] == [prompt] * len(places)
        chunks = ask_stream(server.url, path, **fields)
        for index in range(2):
            own = [(chunk, choice) for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert [id for _, choice in own for id in choice.get("token_ids", [])] == expected
            places = [choice if path == COMPLETIONS else chunk for chunk, choice in own]
            assert [place["prompt_token_ids"] for place in places if "prompt_token_ids" in place] == [prompt]
            assert "prompt_token_ids" in places[0]


def test_several_prompts_have_their_own(server: RunningServer) -> None:
    answer = ask_json(server.url, COMPLETIONS, prompt=["ab", "c"], n=2, return_token_ids=True, prompt_logprobs=0)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97, 98]] * 2 + [[99]] * 2
    assert [len(choice["prompt_logprobs"]) for choice in answer["choices"]] == [2, 2, 1, 1]


def test_token_ids_of_an_echo_are_those_of_the_completion(server: RunningServer) -> None:
    answer = ask_json(server.url, COMPLETIONS, prompt="ab", echo=True, max_tokens=2, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == REPLY[:2]
    assert answer["choices"][0]["text"] == "abHe"
    none = ask_json(server.url, COMPLETIONS, prompt="ab", echo=True, max_tokens=0, return_token_ids=True)
    assert none["choices"][0]["token_ids"] == []


# prompt_logprobs


@pytest.mark.parametrize("num", [0, 1, 3])
def test_prompt_logprobs(server: RunningServer, num: int) -> None:
    """The fake engine says -0.5 of each token, which it ranks first, and names the bytes after it."""
    for path in BOTH:
        answer = ask_json(server.url, path, prompt_logprobs=num, n=2)
        _, *others = prompt_ids(server)
        expected: list[Any] = [None]
        for token_id in others:
            top = {(token_id + k) % 256: (-0.5 - k, k + 1) for k in range(num)} | {token_id: (-0.5, 1)}
            expected.append({str(id): {"logprob": logprob, "rank": rank} for id, (logprob, rank) in top.items()})
        places = answer["choices"] if path == COMPLETIONS else [answer]
        for place in places:
            texts = [entry.pop("decoded_token") for some in place["prompt_logprobs"] if some for entry in some.values()]
            assert place["prompt_logprobs"] == expected
            assert len(texts) == sum(map(len, filter(None, expected)))
        assert server.engine.submits[-1].params.prompt_logprobs == num


def test_prompt_logprobs_decode_their_tokens(server: RunningServer) -> None:
    answer = ask_json(server.url, COMPLETIONS, prompt="xyz", prompt_logprobs=2)
    _, second, third = answer["choices"][0]["prompt_logprobs"]
    assert [entry["decoded_token"] for entry in second.values()] == ["y", "z"]
    assert [entry["decoded_token"] for entry in third.values()] == ["z", "{"]


@pytest.mark.parametrize(("prompt_logprobs", "logprobs"), [(3, 1), (1, 3), (0, 2)])
def test_echo_has_its_own_number_of_alternatives(server: RunningServer, prompt_logprobs: int, logprobs: int) -> None:
    fields: dict[str, Any] = {"prompt": "xyz", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    both = ask_json(server.url, COMPLETIONS, prompt_logprobs=prompt_logprobs, **fields)["choices"][0]
    assert both["logprobs"] == ask_json(server.url, COMPLETIONS, **fields)["choices"][0]["logprobs"]
    assert [len(some or ()) for some in both["prompt_logprobs"]] == [0, *[max(1, prompt_logprobs)] * 2]


# truncate_prompt_tokens


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 3}, b"def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, b"def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"abc"),
        ({"truncate_prompt_tokens": 6}, b"abcdef"),
        ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, b"abcdef"),
        ({"truncate_prompt_tokens": -1}, b"abcdef"),
        ({"truncate_prompt_tokens": None, "truncation_side": "right"}, b"abcdef"),
    ],
)
def test_prompt_is_cut(server: RunningServer, fields: dict[str, Any], expected: bytes) -> None:
    for prompt in ("abcdef", [*b"abcdef"]):
        answer = ask_json(server.url, COMPLETIONS, prompt=prompt, echo=True, max_tokens=2, **fields)
        assert prompt_ids(server) == [*expected]
        assert answer["usage"]["prompt_tokens"] == len(expected)
        assert answer["choices"][0]["text"] == expected.decode() + "He"


def test_messages_are_cut(server: RunningServer) -> None:
    ask_json(server.url, CHAT)
    whole = prompt_ids(server)
    ask_json(server.url, CHAT, truncate_prompt_tokens=5)
    assert prompt_ids(server) == whole[-5:]


def test_minus_one_is_what_there_is_room_for(server: RunningServer) -> None:
    long: dict[str, Any] = {"prompt": [*range(256)] * 9, "truncate_prompt_tokens": -1}
    for fields, room in (({"max_tokens": 100}, 100), ({}, 1)):
        ask_json(server.url, COMPLETIONS, **long, **fields)
        assert prompt_ids(server) == long["prompt"][-(MAX_MODEL_LEN - room) :]
    error = check_error(ask(server.url, COMPLETIONS, max_tokens=MAX_MODEL_LEN, **long), 400)
    assert error["code"] == "context_length_exceeded"
    error = check_error(ask(server.url, COMPLETIONS, **long | {"truncate_prompt_tokens": MAX_MODEL_LEN + 1}), 400)
    assert error["code"] == "context_length_exceeded"


# stream_interval


@pytest.mark.parametrize("path", BOTH)
def test_a_chunk_every_so_many_tokens(start_server: StartServer, fake_engine: FakeEngine, path: str) -> None:
    """Of all but the first and the last. Tokens that come at once are in one chunk in any case."""
    fake_engine.config.step_seconds = 0.01
    server = start_server()
    fields = {"return_token_ids": True, "n": 2, "logprobs": 1 if path == COMPLETIONS else True}
    for interval, max_chunks in ((None, 14), (1, 14), (5, 4), (10**18, 2)):
        chunks = ask_stream(server.url, path, stream_interval=interval, **fields)
        for index in range(2):
            choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            parts = [choice["token_ids"] for choice in choices if choice.get("token_ids")]
            assert len(parts) <= max_chunks
            assert all(len(part) >= (interval or 1) for part in parts[1:-1])
            assert [token_id for part in parts for token_id in part] == [*REPLY, EOS_TOKEN_ID]
        assert stream_texts(chunks) == {0: "Hello, world!", 1: "Hello, world!"}
        assert finish_reasons(chunks) == {0: ["stop"], 1: ["stop"]}


# return_tokens_as_token_ids


def test_tokens_in_log_probabilities_as_their_ids(server: RunningServer) -> None:
    """The bytes that the chat has beside them stay the token's own."""
    ids = [f"token_id:{token_id}" for token_id in (*REPLY, EOS_TOKEN_ID)]
    fields = {"return_tokens_as_token_ids": True}
    logprobs = ask_json(server.url, COMPLETIONS, logprobs=2, **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ids
    assert logprobs["top_logprobs"][0] == {"token_id:72": -0.5, "token_id:73": -1.5}
    content = ask_json(server.url, CHAT, logprobs=True, top_logprobs=2, **fields)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ids
    assert content[0]["bytes"] == [72]
    assert [entry["token"] for entry in content[0]["top_logprobs"]] == ["token_id:72", "token_id:73"]
    chunks = ask_stream(server.url, CHAT, logprobs=True, **fields)
    parts = [choice["logprobs"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [entry["token"] for part in parts for entry in part] == ids


# --max-logprobs

ASKING: list[tuple[str, str, dict[str, Any]]] = [
    (COMPLETIONS, "logprobs", {}),
    (COMPLETIONS, "prompt_logprobs", {}),
    (CHAT, "top_logprobs", {"logprobs": True}),
    (CHAT, "prompt_logprobs", {}),
]


@pytest.mark.parametrize(("path", "name", "fields"), ASKING)
def test_how_many_alternatives_are_allowed(
    start_server: StartServer, path: str, name: str, fields: dict[str, Any]
) -> None:
    def num_asked(server: RunningServer) -> int | None:
        params = server.engine.submits[-1].params
        return params.prompt_logprobs if name == "prompt_logprobs" else params.logprobs

    for limit, allowed, refused in ((20, [0, 20], [-1, 21]), (3, [3], [-1, 4, 20]), (-1, [-1, 200, 259], [-2, 260])):
        server = start_server(max_logprobs=limit)
        for number in allowed:
            answer = ask_json(server.url, path, **fields, **{name: number})
            assert num_asked(server) == (259 if number == -1 else number)
            if name == "prompt_logprobs" and path == CHAT:
                assert all(len(entry) >= min(number, 256) for entry in answer["prompt_logprobs"][1:])
        for number in refused:
            error = check_error(ask(server.url, path, **fields, **{name: number}), 400)
            assert error["param"] == name
            assert str(number) in error["message"] or str(limit) in error["message"]


def test_all_tokens_for_an_echoed_prompt(start_server: StartServer) -> None:
    server = start_server(max_logprobs=-1)
    answer = ask_json(server.url, COMPLETIONS, prompt="ab", echo=True, logprobs=-1, max_tokens=1)
    assert [len(top or ()) for top in answer["choices"][0]["logprobs"]["top_logprobs"]] == [0, 256, 256]
