"""Each parameter, over HTTP: good values reach the engine or act, bad ones are a 400 that names them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.shared.messages import MIROSTAT_ORDER, RepetitionDetection, SamplerChain, SamplingParams
from server.api.chat.schemas import ChatCompletionRequest
from server.generation.parameters import INSTEAD
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MINIMAL, ask, ask_json, shared_server
from tests.support.serving import RunningServer, check_error

BOTH = (COMPLETIONS, CHAT)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[RunningServer]:
    """One for all tests here that change nothing about it."""
    with shared_server(model_folder) as server:
        yield server


# parameter -> JSON values, and what of them the engine gets
REACHING: dict[str, list[tuple[Any, Any]]] = {
    "temperature": [(0, 0.0), (0.7, 0.7), (2, 2.0), (1e-320, 0.0), (0.01, 0.01), (None, 1.0)],
    "top_p": [(1, 1.0), (0.25, 0.25), (None, 1.0)],
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
        (
            {"max_pattern_size": 5, "min_pattern_size": 2, "min_count": 3},
            RepetitionDetection(min_pattern_size=2, max_pattern_size=5, min_count=3),
        ),
        (
            {"max_pattern_size": 256, "min_pattern_size": 0, "min_count": 2},
            RepetitionDetection(min_pattern_size=1, max_pattern_size=256, min_count=2),
        ),
        ({"max_pattern_size": 0, "min_count": 3}, None),
        ({}, None),
        (None, None),
    ],
    "bad_words": [(["ab", " c"], ((97, 98), (32, 97, 98), (99,), (32, 99))), ([" "], ((32,),)), ([], ()), (None, ())],
}


@pytest.mark.parametrize("name", REACHING)
@pytest.mark.parametrize("path", BOTH)
def test_parameter_reaches_the_engine(server: RunningServer, path: str, name: str) -> None:
    for value, expected in REACHING[name]:
        answer = ask(server.url, path, **{name: value})
        assert answer.status_code == 200, answer.text
        got = getattr(server.engine.submits[-1].params, name)
        assert got == expected
        assert type(got) is type(expected)


@pytest.mark.parametrize("path", BOTH)
def test_defaults_leave_the_distribution_as_it_is(server: RunningServer, path: str) -> None:
    assert ask(server.url, path, seed=3).status_code == 200
    submit = server.engine.submits[-1]
    max_tokens = 16 if path == COMPLETIONS else 2048 - len(submit.prompt_token_ids)
    assert submit.params == SamplingParams(max_tokens=max_tokens, seed=3)
    assert (submit.n, submit.priority, submit.cache_salt) == (1, 0, "")


@pytest.mark.parametrize("path", BOTH)
def test_priority_salt_and_n_reach_the_engine(server: RunningServer, path: str) -> None:
    answer = ask_json(server.url, path, n=3, priority=-7, cache_salt="pepper")
    submit = server.engine.submits[-1]
    assert (submit.n, submit.priority, submit.cache_salt) == (3, -7, "pepper")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def test_the_models_own_sampling_is_the_default(start_server: StartServer, model_folder: Path) -> None:
    path = model_folder / "generation_config.json"
    path.write_text('{"temperature": 0.25, "top_k": 11, "top_p": 0.75, "min_p": 0.125, "repetition_penalty": 1.5}')
    try:
        server = start_server()
    finally:
        path.unlink()
    ask_json(server.url, CHAT)
    params = server.engine.submits[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.25, 11, 0.75, 0.125)
    assert params.repetition_penalty == 1.5
    ask_json(server.url, CHAT, temperature=1, top_k=-1, top_p=1, min_p=0, repetition_penalty=1)
    params = server.engine.submits[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert params.repetition_penalty == 1.0


# parameters -> what the chain of samplers has beside its defaults
CHAINS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"typical_p": 1, "top_n_sigma": -1, "xtc_probability": 0, "dry_multiplier": 0.0, "mirostat": 0}, None),
    ({"xtc_threshold": 0.2, "dry_base": 2, "dry_sequence_breakers": ["a"], "mirostat_tau": 1}, None),
    ({"typical_p": None, "samplers": None, "repeat_last_n": -1}, None),
    ({"typical_p": 0.5}, {"typical_p": 0.5}),
    ({"top_n_sigma": 1.5}, {"top_n_sigma": 1.5}),
    ({"xtc_probability": 0.5}, {"xtc_probability": 0.5}),
    ({"xtc_probability": 0.5, "xtc_threshold": 0}, {"xtc_probability": 0.5, "xtc_threshold": 0.0}),
    ({"repeat_last_n": 0}, {"repeat_last_n": 0}),
    ({"repeat_last_n": 64}, {"repeat_last_n": 64}),
    ({"samplers": []}, {"order": ()}),
    ({"samplers": ["temperature", "min_p"]}, {"order": ("temperature", "min_p")}),
    ({"mirostat": 1}, {"order": MIROSTAT_ORDER, "mirostat": 1}),
    (
        {"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.5},
        {"order": MIROSTAT_ORDER, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    ),
    ({"dry_multiplier": 0.8, "dry_sequence_breakers": []}, {"dry_multiplier": 0.8}),
    (
        {"dry_multiplier": 0.8},
        {"dry_multiplier": 0.8, "dry_breakers": {1: frozenset([(10,), (58,), (34,), (42,)])}},
    ),
    (
        {
            "dry_multiplier": 1,
            "dry_base": 2,
            "dry_allowed_length": 3,
            "dry_penalty_last_n": 100,
            "dry_sequence_breakers": ["z", "bc"],
        },
        {
            "dry_multiplier": 1.0,
            "dry_base": 2.0,
            "dry_allowed_length": 3,
            "dry_penalty_last_n": 100,
            "dry_breakers": {1: frozenset([(122,)]), 2: frozenset([(98, 99)])},
        },
    ),
]


@pytest.mark.parametrize(("fields", "expected"), CHAINS)
@pytest.mark.parametrize("path", BOTH)
def test_chain_of_samplers(
    server: RunningServer, path: str, fields: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert ask(server.url, path, **fields).status_code == 200
    chain = server.engine.submits[-1].params.chain
    assert chain == (None if expected is None else SamplerChain(**expected))


@pytest.mark.parametrize("path", BOTH)
def test_repeat_penalty_is_repetition_penalty(server: RunningServer, path: str) -> None:
    for fields in ({"repeat_penalty": 1.5}, {"repeat_penalty": 1.5, "repetition_penalty": 1.5}):
        assert ask(server.url, path, **fields).status_code == 200
        params = server.engine.submits[-1].params
        assert (params.repetition_penalty, params.chain) == (1.5, None)


def test_probabilities_after_sampling(server: RunningServer) -> None:
    for path, logprobs in ((COMPLETIONS, 2), (CHAT, True)):
        for value in (True, False, None):
            assert ask(server.url, path, logprobs=logprobs, post_sampling_probs=value).status_code == 200
            assert server.engine.submits[-1].params.post_sampling_probs == bool(value)


def test_named_tokens_take_the_place_of_the_most_likely(server: RunningServer) -> None:
    for path, fields in ((COMPLETIONS, {"logprobs": 5}), (CHAT, {"logprobs": True, "top_logprobs": 5})):
        for value, expected in (([3, 258, 3], (0, (3, 258))), ([], (5, ())), (None, (5, ()))):
            assert ask(server.url, path, logprob_token_ids=value, **fields).status_code == 200
            params = server.engine.submits[-1].params
            assert (params.logprobs, params.logprob_token_ids) == expected


@pytest.mark.parametrize("path", BOTH)
def test_what_excludes_another(server: RunningServer, path: str) -> None:
    for fields in (
        {"samplers": ["min_p"], "mirostat": 1},
        {"repeat_penalty": 1.1, "repetition_penalty": 1.2},
        {"post_sampling_probs": True},
        {"logprob_token_ids": [1]},
        {"allowed_token_ids": [3, 256], "stop_token_ids": [3], "min_tokens": 1},
    ):
        error = check_error(ask(server.url, path, **fields), 400)
        assert error["param"] == next(iter(fields))


NOT_A_NUMBER = ["1", True, [], {}]
NOT_AN_INTEGER = ["1", True, 1.0, 1.5, [], {}]

# parameter -> values that are refused
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 129, 10**12, *NOT_AN_INTEGER],
    "max_tokens": [-1, 10**18, *NOT_AN_INTEGER],
    "temperature": [-0.1, 2.1, *NOT_A_NUMBER],
    "top_p": [0, -0.0, 1.1, -1, *NOT_A_NUMBER],
    "top_k": [-2, 2**63, *NOT_AN_INTEGER],
    "min_p": [-0.1, 1.1, *NOT_A_NUMBER],
    "repetition_penalty": [0, -1, 1e-320, 10.1, *NOT_A_NUMBER],
    "frequency_penalty": [-2.1, 2.1, *NOT_A_NUMBER],
    "presence_penalty": [-2.1, 2.1, *NOT_A_NUMBER],
    "seed": [2**63, -(2**63) - 1, *NOT_AN_INTEGER],
    "stop": ["", [""], list("abcde"), "x" * (1 << 20), 5, True, ["a", 5], {}, "\ud800", ["\ud800"]],
    "stop_token_ids": [[-1], [259], [2**40], [2**80], ["1"], [1.0], [True], 5, "a", [1] * 129],
    "min_tokens": [-1, 17 * 10**9, *NOT_AN_INTEGER],
    "logit_bias": [
        {"259": 1},
        {"abc": 1},
        {"-1": 1},
        {" 1": 1},
        {"1_0": 1},
        {"²": 1},
        {"1": 101},
        {"1": -100.5},
        {"1": "5"},
        {"1": True},
        {"1": None},
        {str(i): 1 for i in range(5_000)},
        [],
        "a",
        5,
    ],
    "allowed_token_ids": [[], [-1], [259], [2**80], ["1"], [1.0], [True], 5, "a", [1] * (2**18 + 1)],
    "bad_words": [[""], ["x" * 1025], ["a"] * 65, [5], "a", 5, ["a", None], ["\ud800"]],
    "post_sampling_probs": ["true", 1, []],
    "samplers": [["min_p", "min_p"], "min_p", [1], 5, {}, [None]],
    "typical_p": [0, -0.5, 1.1, *NOT_A_NUMBER],
    "top_n_sigma": [-1.5, 1001, *NOT_A_NUMBER],
    "xtc_probability": [-0.1, 1.1, *NOT_A_NUMBER],
    "xtc_threshold": [-0.1, 1.1, *NOT_A_NUMBER],
    "dry_multiplier": [-0.1, 1e300, *NOT_A_NUMBER],
    "dry_base": [0.9, 1e300, *NOT_A_NUMBER],
    "dry_allowed_length": [0, 257, *NOT_AN_INTEGER],
    "dry_penalty_last_n": [-2, 2**63, *NOT_AN_INTEGER],
    "dry_sequence_breakers": [[""], ["x" * 41], ["a"] * 33, [5], "a", 5, ["\ud800"]],
    "repeat_penalty": [0, -1, 10.1, *NOT_A_NUMBER],
    "repeat_last_n": [-2, 2**63, *NOT_AN_INTEGER],
    "mirostat": [-1, 3, *NOT_AN_INTEGER],
    "mirostat_tau": [-1, 1001, *NOT_A_NUMBER],
    "mirostat_eta": [-1, 1001, *NOT_A_NUMBER],
    "truncate_prompt_tokens": [-2, 0, 2**63, *NOT_AN_INTEGER],
    "prompt_logprobs": [-1, 21, *NOT_AN_INTEGER],
    "return_token_ids": ["true", 1, []],
    "return_tokens_as_token_ids": ["true", 1, []],
    "guided_json": [5, True, [], "{", "[]", {"type": "strin"}],
    "guided_regex": ["", "a(", 5, ["a"], "a" * 8193],
    "guided_choice": [[], [""], ["a", 5], "a", ["a"] * 1001],
    "guided_grammar": ["", "nonsense", 5, {}],
    "logprob_token_ids": [[-1], [259], [2**80], ["1"], [1.0], [True], 5, "a", [1] * 129],
    "ignore_eos": ["true", 1, []],
    "include_stop_str_in_output": ["true", 1],
    "skip_special_tokens": ["true", 0],
    "repetition_detection": [
        5,
        [],
        {"max_pattern_size": 257, "min_count": 2},
        {"max_pattern_size": -1},
        {"max_pattern_size": 2.0, "min_count": 2},
        {"max_pattern_size": 2},
        {"max_pattern_size": 2, "min_count": 1},
        {"max_pattern_size": 2, "min_count": 2**63},
        {"max_pattern_size": 2, "min_count": 2, "min_pattern_size": 3},
        {"min_pattern_size": 1},
    ],
    "thinking_token_budget": [0, 5, -2, 2**63, *NOT_AN_INTEGER],  # of a model that does not think
    "priority": [2**63, -(2**63) - 1, *NOT_AN_INTEGER],
    "cache_salt": [5, [], "x" * 257],
    "request_id": [5, [], "", "a b", "x" * 129],
    "stream": ["true", 1, {}],
    "stream_interval": [0, -1, 2**63, *NOT_AN_INTEGER],
}


def post(url: str, path: str, fields: dict[str, Any]) -> httpx.Response:
    """Not `ask`, for what httpx refuses to encode."""
    body = json.dumps(MINIMAL[path] | fields)
    return httpx.post(url + path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", BOTH)
def test_bad_value_is_refused_by_name(server: RunningServer, path: str, name: str) -> None:
    num_submits = len(server.engine.submits)
    for value in BAD[name]:
        error = check_error(post(server.url, path, {name: value}), 400)
        assert error["type"] == "invalid_request_error"
        if error["code"] != "context_length_exceeded":
            assert re.split(r"[.\[]", error["param"])[0] == name, error
            assert f"'{error['param']}'" in error["message"], error
        assert len(error["message"]) < 400
    assert len(server.engine.submits) == num_submits
    assert server.context.client.num_in_flight == 0


@pytest.mark.parametrize("path", BOTH)
def test_samplers_that_nobody_knows_are_refused(server: RunningServer, path: str) -> None:
    for name in ("penalty", "mirostat", "e", ""):
        error = check_error(ask(server.url, path, samplers=["min_p", name]), 400)
        assert error["param"] == "samplers[1]"
        assert "'penalties', 'dry', 'top_n_sigma'" in error["message"]


@pytest.mark.parametrize("path", BOTH)
def test_not_a_number_is_not_json(server: RunningServer, path: str) -> None:
    for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"model": "tiny", "prompt": "Hi", "temperature": {literal}}}'
        headers = {"content-type": "application/json"}
        check_error(httpx.post(server.url + path, content=body, headers=headers), 400)


# fields -> OpenAI's words, which clients match on; param; code
WORDING: list[tuple[dict[str, Any], str, str | None, str | None]] = [
    (
        {"n": 130},
        "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 130 instead.",
        "n",
        "integer_above_max_value",
    ),
    (
        {"n": 0},
        "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        "n",
        "integer_below_min_value",
    ),
    (
        {"max_tokens": 1.5},
        "Invalid type for 'max_tokens': expected an integer, but got a decimal number instead.",
        "max_tokens",
        "invalid_type",
    ),
    (
        {"temperature": 2.5},
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead.",
        "temperature",
        "decimal_above_max_value",
    ),
    ({"model": ""}, "you must provide a model parameter", None, None),
]


@pytest.mark.parametrize(("fields", "message", "param", "code"), WORDING)
@pytest.mark.parametrize("path", BOTH)
def test_wording_is_openais(
    server: RunningServer, path: str, fields: dict[str, Any], message: str, param: str | None, code: str | None
) -> None:
    error = check_error(ask(server.url, path, **fields), 400)
    assert (error["message"], error["param"], error["code"]) == (message, param, code)


@pytest.mark.parametrize("path", BOTH)
def test_missing_fields(server: RunningServer, path: str) -> None:
    for name in MINIMAL[path]:
        body = {key: value for key, value in MINIMAL[path].items() if key != name}
        error = check_error(httpx.post(server.url + path, json=body), 400)
        if name == "model":
            assert error["message"] == "you must provide a model parameter"
            assert (error["param"], error["code"]) == (None, None)
        else:
            assert error["message"] == f"Missing required parameter: '{name}'."
            assert (error["param"], error["code"]) == (name, "missing_required_parameter")


@pytest.mark.parametrize("path", BOTH)
def test_model_name(server: RunningServer, path: str) -> None:
    for name in ("tiny", "org/tiny"):
        assert ask_json(server.url, path, model=name)["model"] == name
    for name in ("gpt-4o", "Tiny", "tiny ", "x" * 10_000):
        error = check_error(ask(server.url, path, model=name), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "does not exist" in error["message"]
        assert len(error["message"]) < 300
    for wrong in (5, None, True, ["tiny"]):
        check_error(ask(server.url, path, model=wrong), 400)


@pytest.mark.parametrize("path", BOTH)
def test_stream_options(server: RunningServer, path: str) -> None:
    for fields in ({}, {"stream": False}, {"stream": None}):
        error = check_error(ask(server.url, path, stream_options={"include_usage": True}, **fields), 400)
        assert error["param"] == "stream_options"
    wrong: list[Any] = [{"include_usage": 1}, {"include_usage": "true"}, [], "a", 5, {"continuous_usage_stats": []}]
    for value in wrong:
        error = check_error(ask(server.url, path, stream=True, stream_options=value), 400)
        assert error["param"].split(".")[0] == "stream_options"
    for null in (None, {}, {"include_usage": None}, {"include_obfuscation": False}):
        assert ask(server.url, path, stream=True, stream_options=null).status_code == 200


@pytest.mark.parametrize("path", BOTH)
def test_min_tokens_must_fit_max_tokens(server: RunningServer, path: str) -> None:
    error = check_error(ask(server.url, path, min_tokens=6, max_tokens=5), 400)
    assert error["param"] == "min_tokens"
    assert ask(server.url, path, min_tokens=5, max_tokens=5).status_code == 200


@pytest.mark.parametrize("path", BOTH)
def test_what_a_stream_cannot_do(server: RunningServer, path: str) -> None:
    error = check_error(ask(server.url, path, stream=True, prompt_logprobs=0), 400)
    assert error["param"] == "prompt_logprobs"
    assert "'stream'" in error["message"]


@pytest.mark.parametrize("path", BOTH)
def test_truncation_side(server: RunningServer, path: str) -> None:
    for value in ("middle", "", 5, True):
        error = check_error(ask(server.url, path, truncation_side=value, truncate_prompt_tokens=3), 400)
        assert error["param"] == "truncation_side"


def test_best_of(server: RunningServer) -> None:
    for fields in ({"best_of": 1, "n": 2}, {"best_of": 0}, {"best_of": 2, "stream": True}, {"best_of": 21}):
        error = check_error(ask(server.url, COMPLETIONS, **fields), 400)
        assert error["param"] == "best_of"
        assert "'best_of'" in error["message"]
    wrong: list[Any] = [*NOT_AN_INTEGER, -1]
    for value in wrong:
        assert check_error(ask(server.url, COMPLETIONS, best_of=value), 400)["param"] == "best_of"
    assert ask(server.url, COMPLETIONS, best_of=20, max_tokens=1).status_code == 200
    assert ask(server.url, COMPLETIONS, best_of=2, n=2, stream=True).status_code == 200
    assert check_error(ask(server.url, CHAT, best_of=2), 400)["code"] == "unsupported_parameter"


# What would change the answer -> values that ask for it
UNSUPPORTED: dict[str, list[Any]] = {
    "tools": [[{"type": "function", "function": {"name": "f"}}], "x"],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "modalities": [["text", "audio"], ["audio"], []],
    "prediction": [{"type": "content", "content": "a"}],
    "web_search_options": [{}],
    "json_schema": [{}],
    "regex": ["a"],
    "ebnf": ["a"],
    "grammar": ["root ::= a"],
    "suffix": ["a"],
    "use_beam_search": [True],
    "chat_template": ["a", ""],
    "chat_template_kwargs": [{"a": 1}, "bad"],
    "continue_final_message": [True],
    "reasoning_effort": ["low", "high"],
    "n_predict": [5],
    "n_probs": [5],
    "t_max_predict_ms": [5],
    "thinking_budget_tokens": [5],
    "reasoning_format": ["none"],
    "lora_path": ["/adapters/sql", ["sql"]],
    "lora": [[{"id": 0, "scale": 0.5}]],
}

# What asks for nothing: the default of each
NOTHING: dict[str, list[Any]] = {name: [None] for name in UNSUPPORTED} | {
    "tools": [None, []],
    "tool_choice": [None, "none", "auto"],
    "functions": [None, []],
    "function_call": [None, "none", "auto"],
    "modalities": [None, ["text"]],
    "best_of": [None, 1],
    "suffix": [None, ""],
    "lora": [None, []],
    "use_beam_search": [None, False],
    "chat_template_kwargs": [None, {}],
    "continue_final_message": [None, False],
    "reasoning_effort": [None, "none", "medium"],
    "bad_words": [None, []],
    "typical_p": [None, 1, 1.0],
    "dry_multiplier": [None, 0],
    "xtc_probability": [None, 0.0],
    "mirostat": [None, 0],
    "user": ["me"],
    "store": [True],
    "metadata": [{"a": "b"}],
    "service_tier": ["auto"],
    "safety_identifier": ["me"],
    "prompt_cache_key": ["me"],
    "parallel_tool_calls": [True],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("path", BOTH)
def test_what_is_not_supported_yet_is_refused(server: RunningServer, path: str, name: str) -> None:
    if path == CHAT and name in ChatCompletionRequest.model_fields:
        return
    num_submits = len(server.engine.submits)
    for value in UNSUPPORTED[name]:
        error = check_error(ask(server.url, path, **{name: value}), 400)
        assert error["param"] == name
        assert "supported" in error["message"]
        assert error["code"] == "unsupported_parameter"
        assert (f"Use {INSTEAD.get(name)}" in error["message"]) == (name in INSTEAD)
    assert len(server.engine.submits) == num_submits


@pytest.mark.parametrize("path", BOTH)
def test_what_changes_nothing_passes_in_silence(start_server: StartServer, path: str) -> None:
    server = start_server(strict=True)
    for name, values in NOTHING.items():
        for value in values:
            if path == CHAT and (name, value) in [("tools", []), ("tool_choice", "auto")]:
                continue  # as at OpenAI an error there
            answer = ask(server.url, path, **{name: value})
            assert answer.status_code == 200, answer.text
            assert "x-lightwell-warnings" not in answer.headers
    assert server.metric("lightwell_unknown_parameters_total") == 0


@pytest.mark.parametrize("path", BOTH)
def test_unknown_fields_are_ignored_counted_and_named(server: RunningServer, path: str) -> None:
    num_before = server.metric("lightwell_unknown_parameters_total")
    answer = ask(server.url, path, max_token=5, **{"é\r\nx-evil: 1": 2})
    assert answer.status_code == 200
    assert answer.headers["x-lightwell-warnings"] == "ignored parameters: max_token, ???x-evil??1"
    assert "x-evil" not in answer.headers
    assert server.metric("lightwell_unknown_parameters_total") == num_before + 2
    many = ask(server.url, path, stream=True, **{f"unknown_{i}" + "x" * 500: i for i in range(200)})
    assert len(many.headers["x-lightwell-warnings"]) < 1100
    assert many.headers["x-lightwell-warnings"].endswith(", ...")


def test_unknown_fields_further_down_are_named_too(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {}}]
    messages = [
        {"role": "user", "content": parts, "mood": 1},
        {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": "c", "mood": 2},
    ]
    options = {"include_usage": True, "verbose": True}
    answer = ask(server.url, CHAT, messages=messages, stream=True, stream_options=options)
    names = "stream_options.verbose, messages[].mood, messages[].content[].cache_control"
    assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: {names}"


@pytest.mark.parametrize("path", BOTH)
def test_unknown_fields_are_refused_if_strict(start_server: StartServer, path: str) -> None:
    server = start_server(strict=True)
    error = check_error(ask(server.url, path, max_token=5), 400)
    assert error["message"] == "Unrecognized request argument supplied: max_token"
    assert (error["param"], error["code"]) == (None, None)


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
    seeds = []
    for server in (start_server(seed=1), start_server(seed=1), start_server(seed=2)):
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


@pytest.mark.parametrize("name", ["", " ", "\n", "é"])
def test_a_field_of_any_name_is_named_in_a_header(start_server: StartServer, name: str) -> None:
    answer = httpx.post(start_server().url + "/tokenize", json={"prompt": "Hi", name: 1})
    assert answer.headers["x-lightwell-warnings"] == "ignored parameters: ?"
