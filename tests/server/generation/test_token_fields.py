"""vLLM's additions: token ids, and log probabilities of the prompt."""

from typing import Any

import pytest

from tests.support.clients import CHAT, COMPLETIONS, ask_json, ask_stream
from tests.support.fake_engine import EOS_TOKEN_ID
from tests.support.serving import RunningServer

BOTH = (COMPLETIONS, CHAT)
REPLY = [*b"Hello, world!"]


def prompt_ids(server: RunningServer) -> list[int]:
    """Return the prompt of the last request as the engine received it."""
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
    """The chunks of a stream hold them all together, and the prompt's token ids once per choice."""
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
    for num_tokens in (2, 0):
        fields = {"prompt": "ab", "echo": True, "max_tokens": num_tokens, "return_token_ids": True}
        (choice,) = ask_json(server.url, COMPLETIONS, **fields)["choices"]
        assert (choice["token_ids"], choice["text"]) == (REPLY[:num_tokens], "ab" + "He"[:num_tokens])


# prompt_logprobs


@pytest.mark.parametrize("num", [0, 1, 3])
def test_prompt_logprobs(server: RunningServer, num: int) -> None:
    """The fake engine reports -0.5 and rank 1 for each token, and the bytes after it as alternatives."""
    for path in BOTH:
        answer = ask_json(server.url, path, prompt_logprobs=num, n=2)
        expected: list[Any] = [None]
        for token_id in prompt_ids(server)[1:]:
            top = {(token_id + k) % 256: (-0.5 - k, k + 1) for k in range(num)} | {token_id: (-0.5, 1)}
            expected.append({str(id): {"logprob": logprob, "rank": rank} for id, (logprob, rank) in top.items()})
        for place in answer["choices"] if path == COMPLETIONS else [answer]:
            for entry in (entry for some in place["prompt_logprobs"][1:] for entry in some.values()):
                assert isinstance(entry.pop("decoded_token"), str)
            assert place["prompt_logprobs"] == expected
        assert server.engine.submits[-1].params.prompt_logprobs == num


@pytest.mark.parametrize(("prompt_logprobs", "logprobs"), [(2, 1), (1, 3), (0, 2)])
def test_echo_has_its_own_number_of_alternatives(server: RunningServer, prompt_logprobs: int, logprobs: int) -> None:
    """The alternatives to the prompt's tokens have their texts."""
    fields: dict[str, Any] = {"prompt": "xyz", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    both = ask_json(server.url, COMPLETIONS, prompt_logprobs=prompt_logprobs, **fields)["choices"][0]
    assert both["logprobs"] == ask_json(server.url, COMPLETIONS, **fields)["choices"][0]["logprobs"]
    texts = [[entry["decoded_token"] for entry in some.values()] for some in both["prompt_logprobs"][1:]]
    assert texts == ([["y", "z"], ["z", "{"]] if prompt_logprobs == 2 else [["y"], ["z"]])


# return_tokens_as_token_ids


def test_tokens_in_log_probabilities_as_their_ids(server: RunningServer) -> None:
    """The bytes in chat answers remain those of the token."""
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
