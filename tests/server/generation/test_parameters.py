"""What reaches the engine: parameters and seeds; and what vLLM adds to answers: ids of tokens."""

from array import array
from itertools import product
from typing import Any

import pytest

from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, RepetitionDetection, SequenceBreaker
from server.generation.parameters import derive_seed
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, ask, ask_json, ask_stream
from tests.support.fake_engine import EOS_TOKEN_ID
from tests.support.serving import RunningServer, check_error

BOTH = (COMPLETIONS, CHAT)


def detect(least: int, most: int, count: int) -> RepetitionDetection:
    return RepetitionDetection(min_pattern_size=least, max_pattern_size=most, min_count=count)


# parameter -> JSON values and the values that the engine receives
REACHING: dict[str, list[tuple[Any, Any]]] = {
    "temperature": [(0, 0.0), (0.7, 0.7), (2, 2.0), (1e-320, 0.0), (0.01, 0.01), (None, 1.0)],
    "top_p": [(1, 1.0), (0.25, 0.25), (0, 1e-6), (None, 1.0)],
    "top_k": [(1, 1), (40, 40), (0, 0), (-1, 0), (10**9, 0), (None, 0)],
    "min_p": [(0, 0.0), (1, 1.0), (0.05, 0.05), (None, 0.0)],
    "repetition_penalty": [(0.01, 0.01), (1.1, 1.1), (10, 10.0), (None, 1.0)],
    "frequency_penalty": [(-2, -2.0), (2, 2.0), (0.5, 0.5), (None, 0.0)],
    "presence_penalty": [(-2, -2.0), (2, 2.0), (0.5, 0.5), (None, 0.0)],
    "logit_bias": [({"0": -100, "258": 100.0, "7": 0.5}, {0: -100.0, 258: 100.0, 7: 0.5}), ({}, {}), (None, {})],
    "seed": [(0, 0), (-2, -2), (2**63 - 1, 2**63 - 1), (-(2**63), -(2**63))],
    "min_tokens": [(0, 0), (5, 5), (None, 0)],
    "ignore_eos": [(True, True), (False, False), (None, False)],
    "stop_token_ids": [([0, 258], (0, 258)), ([], ()), (None, ())],
    "max_tokens": [(1, 1), (100, 100)],
    "allowed_token_ids": [([258, 0, 258], (258, 0)), (None, ())],
    "repetition_detection": [
        ({"max_pattern_size": 5, "min_pattern_size": 2, "min_count": 3}, detect(2, 5, 3)),
        ({"max_pattern_size": 256, "min_pattern_size": 0, "min_count": 2}, detect(1, 256, 2)),
        *(({"max_pattern_size": 0, "min_count": 3}, None), ({}, None), (None, None)),
    ],
    "bad_words": [(["ab", " c"], ((97, 98), (32, 97, 98), (99,), (32, 99))), ([" "], ((32,),)), ([], ()), (None, ())],
}


@pytest.mark.parametrize("name", REACHING)
def test_parameter_reaches_the_engine(server: RunningServer, name: str) -> None:
    for path, (value, expected) in product(BOTH, REACHING[name]):
        answer = ask(server.url, path, **{name: value})
        assert answer.status_code == 200, answer.text
        got = getattr(server.engine.submits[-1].params, name)
        assert got == expected
        assert type(got) is type(expected)


@pytest.mark.parametrize("path", BOTH)
def test_priority_salt_and_n_reach_the_engine(server: RunningServer, path: str) -> None:
    answer = ask_json(server.url, path, n=3, priority=-7, cache_salt="pepper")
    submit = server.engine.submits[-1]
    assert (submit.n, submit.priority, submit.cache_salt) == (3, -7, "pepper")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        *(({"post_sampling_probs": value}, {"post_sampling_probs": bool(value)}) for value in (True, False, None)),
        ({"logprob_token_ids": [3, 258, 3]}, {"logprobs": 0, "logprob_token_ids": (3, 258)}),
        *(({"logprob_token_ids": value}, {"logprobs": 5, "logprob_token_ids": ()}) for value in ((), None)),
    ],
)
def test_which_log_probabilities_there_are(
    server: RunningServer, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    for path, asked in ((COMPLETIONS, {"logprobs": 5}), (CHAT, {"logprobs": True, "top_logprobs": 5})):
        assert ask(server.url, path, **asked, **fields).status_code == 200
        params = server.engine.submits[-1].params
        assert {name: getattr(params, name) for name in expected} == expected


# Seeds.


@pytest.mark.parametrize("path", BOTH)
def test_seed_is_random_and_reported(server: RunningServer, path: str) -> None:
    seeds = set()
    for stream in (False, True):
        for _ in range(2):
            answer = ask(server.url, path, stream=stream)
            seed = int(answer.headers["x-lightwell-seed"])
            assert seed == server.engine.submits[-1].params.seed
            assert -(2**63) <= seed < 2**63
            seeds.add(seed)
            seeds.add(int(ask(server.url, path, seed=-1).headers["x-lightwell-seed"]))
    assert len(seeds) == 8
    assert ask(server.url, path, seed=-5).headers["x-lightwell-seed"] == "-5"
    assert answer.headers["x-lightwell-deterministic"] == "true"


def test_seeds_follow_from_the_servers(start_server: StartServer) -> None:
    servers, seeds = [start_server(seed=seed) for seed in (1, 1, 2)], []
    for server in servers:
        seeds.append([ask(server.url, COMPLETIONS).headers["x-lightwell-seed"] for _ in range(3)])
        ask(server.url, COMPLETIONS, seed=7)
        seeds[-1].append(ask(server.url, COMPLETIONS).headers["x-lightwell-seed"])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 8


def test_prompts_have_seeds_of_their_own(server: RunningServer) -> None:
    def seeds(seed: int) -> list[int]:
        ask_json(server.url, COMPLETIONS, prompt=["a", "b", "c"], seed=seed)
        return [submit.params.seed for submit in server.engine.submits[-3:]]

    first = seeds(11)
    assert first[0] == 11
    assert len(set(first)) == 3
    assert seeds(11) == first
    assert not set(seeds(12)) & set(first)


@pytest.mark.checklist("C10")
def test_seeds_have_64_bits() -> None:
    drawn = {derive_seed(7, number, b"request") for number in range(100)}
    assert len(drawn) == 100
    assert min(drawn) < 0 < max(drawn)
    of_prompts = {derive_seed(seed, index, b"prompt") for seed in drawn for index in (1, 1023)}
    assert len(of_prompts | drawn) == 300
    assert -(2**63) <= min(of_prompts) < 0 < max(of_prompts) < 2**63


# --max-logprobs

ASKING: list[tuple[str, str, dict[str, Any]]] = [
    (COMPLETIONS, "logprobs", {}),
    (COMPLETIONS, "prompt_logprobs", {}),
    (CHAT, "top_logprobs", {"logprobs": True}),
    (CHAT, "prompt_logprobs", {}),
]


@pytest.mark.checklist("C12")
@pytest.mark.parametrize(
    ("limit", "allowed", "refused"), [(20, [0, 20], [-1, 21]), (3, [3], [-1, 4, 20]), (-1, [-1, 200, 259], [-2, 260])]
)
def test_how_many_alternatives_are_allowed(
    start_server: StartServer, limit: int, allowed: list[int], refused: list[int]
) -> None:
    server = start_server(max_logprobs=limit)
    for path, name, fields in ASKING:
        for number in allowed:
            answer = ask_json(server.url, path, **fields, **{name: number})
            params = server.engine.submits[-1].params
            num_asked = params.prompt_logprobs if name == "prompt_logprobs" else params.logprobs
            assert num_asked == (259 if number == -1 else number)
            if name == "prompt_logprobs" and path == CHAT:
                assert all(len(entry) >= min(number, 256) for entry in answer["prompt_logprobs"][1:])
        for number in refused:
            error = check_error(ask(server.url, path, **fields, **{name: number}), 400)
            assert error["param"] == name
            assert str(number) in error["message"] or str(limit) in error["message"]
    if limit == -1:
        answer = ask_json(server.url, COMPLETIONS, prompt="ab", echo=True, logprobs=-1, max_tokens=1)
        assert [len(top or ()) for top in answer["choices"][0]["logprobs"]["top_logprobs"]] == [0, 256, 256]


# Extra samplers: the engine receives those that a request turns on.


def breaker(*first: int, rest: tuple[int, ...] = ()) -> SequenceBreaker:
    return SequenceBreaker(array("i", first).tobytes(), rest)


# parameters -> fields of ExtraSamplers that differ from their defaults
DRY = {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 3, "dry_penalty_last_n": 100}
EXTRA_SAMPLERS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"typical_p": 1, "top_n_sigma": -1, "xtc_probability": 0, "dry_multiplier": 0.0, "mirostat": 0}, None),
    ({"xtc_threshold": 0.2, "dry_base": 2, "dry_sequence_breakers": ["a"], "mirostat_tau": 1}, None),
    ({"typical_p": None, "samplers": None, "repeat_last_n": -1}, None),
    *((fields, fields) for fields in ({"typical_p": 0.5}, {"top_n_sigma": 1.5}, {"xtc_probability": 0.5})),
    ({"xtc_probability": 0.5, "xtc_threshold": 0}, {"xtc_probability": 0.5, "xtc_threshold": 0.0}),
    *((fields, fields) for fields in ({"repeat_last_n": 0}, {"repeat_last_n": 64})),
    ({"samplers": []}, {"order": ()}),
    ({"samplers": ["temperature", "min_p"]}, {"order": ("temperature", "min_p")}),
    ({"mirostat": 1}, {"order": MIROSTAT_ORDER, "mirostat": 1}),
    (
        {"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.5},
        {"order": MIROSTAT_ORDER, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    ),
    ({"dry_multiplier": 0.8, "dry_sequence_breakers": []}, {"dry_multiplier": 0.8}),
    ({"dry_multiplier": 0.8}, {"dry_multiplier": 0.8, "dry_breakers": (breaker(10, 34, 42, 58),)}),
    (DRY | {"dry_sequence_breakers": ["z", "bc"]}, DRY | {"dry_breakers": (breaker(122), breaker(98, rest=(99,)))}),
]


@pytest.mark.parametrize(("fields", "expected"), EXTRA_SAMPLERS)
def test_extra_samplers(server: RunningServer, fields: dict[str, Any], expected: dict[str, Any] | None) -> None:
    for path in BOTH:
        assert ask(server.url, path, **fields).status_code == 200
        samplers = server.engine.submits[-1].params.extra_samplers
        assert samplers == (None if expected is None else ExtraSamplers(**expected))


def test_repeat_penalty_is_repetition_penalty(server: RunningServer) -> None:
    for path, more in product(BOTH, ({}, {"repetition_penalty": 1.5})):
        fields = {"repeat_penalty": 1.5} | more
        assert ask(server.url, path, **fields).status_code == 200
        params = server.engine.submits[-1].params
        assert (params.repetition_penalty, params.extra_samplers) == (1.5, None)


# vLLM's additions to answers: token ids, and log probabilities of the prompt.

REPLY = [*b"Hello, world!"]


def prompt_ids(server: RunningServer) -> list[int]:
    """Return the prompt of the last request as the engine received it."""
    return list(server.engine.submits[-1].prompt_token_ids)


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
