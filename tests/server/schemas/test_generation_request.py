"""Invalid values of the parameters that completions and chats share: each is refused by name, in OpenAI's words."""

import json
import re
from typing import Any

import httpx
import pytest

from tests.support.clients import CHAT, COMPLETIONS, MINIMAL, ask, ask_json
from tests.support.serving import RunningServer, check_error

BOTH = (COMPLETIONS, CHAT)


NOT_A_NUMBER = ["1", True, [], {}]
NOT_AN_INTEGER = ["1", True, 1.0, 1.5, [], {}]

# parameter -> values that are refused
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 129, 10**12, *NOT_AN_INTEGER],
    "best_of": [0, -1, 21, *NOT_AN_INTEGER],
    "max_tokens": [-2, 10**19, *NOT_AN_INTEGER],
    "temperature": [-0.1, 2.1, *NOT_A_NUMBER],
    "top_p": [1.1, -1, -1e-9, *NOT_A_NUMBER],
    **{key: [-2, 2**63, *NOT_AN_INTEGER] for key in ("top_k", "dry_penalty_last_n", "repeat_last_n")},
    **{key: [-0.1, 1.1, *NOT_A_NUMBER] for key in ("min_p", "xtc_probability", "xtc_threshold")},
    **{key: [0, -1, 1e-320, 10.1, *NOT_A_NUMBER] for key in ("repetition_penalty", "repeat_penalty")},
    **{key: [-2.1, 2.1, *NOT_A_NUMBER] for key in ("frequency_penalty", "presence_penalty")},
    **{key: [2**63, -(2**63) - 1, *NOT_AN_INTEGER] for key in ("seed", "priority")},
    "stop": [["a"] * 65, ["x" * 1024] * 9, "x" * (1 << 20), 5, True, ["a", 5], {}, "\ud800", ["\ud800"]],
    "stop_token_ids": [[-1], [259], [2**40], [2**80], ["1"], [1.0], [True], 5, "a", [1] * 129],
    "min_tokens": [-1, 17 * 10**9, *NOT_AN_INTEGER],
    "logit_bias": [[], "a", 5, {str(i): 1 for i in range(5_000)}]
    + [{key: 1} for key in ("259", "abc", "-1", " 1", "1_0", "²")]
    + [{"1": value} for value in (101, -100.5, "5", True, None)],
    "allowed_token_ids": [[], [-1], [259], [2**80], ["1"], [1.0], [True], 5, "a", [1] * (2**18 + 1)],
    "bad_words": [[""], ["x" * 1025], ["a"] * 65, [5], "a", 5, ["a", None], ["\ud800"]],
    **{key: ["true", 1, []] for key in ("post_sampling_probs", "return_token_ids", "return_tokens_as_token_ids")},
    "samplers": [["min_p", "min_p"], "min_p", [1], 5, {}, [None]],
    "typical_p": [0, -0.5, 1.1, *NOT_A_NUMBER],
    "top_n_sigma": [-1.5, 1001, *NOT_A_NUMBER],
    "dry_multiplier": [-0.1, 1e300, *NOT_A_NUMBER],
    "dry_base": [0.9, 1e300, *NOT_A_NUMBER],
    "dry_allowed_length": [0, 257, *NOT_AN_INTEGER],
    "dry_sequence_breakers": [[""], ["x" * 41], ["a"] * 33, [5], "a", 5, ["\ud800"]],
    "mirostat": [-1, 3, *NOT_AN_INTEGER],
    **{key: [-1, 1001, *NOT_A_NUMBER] for key in ("mirostat_tau", "mirostat_eta")},
    "truncate_prompt_tokens": [-2, 0, 2**63, *NOT_AN_INTEGER],
    "prompt_logprobs": [-1, 21, *NOT_AN_INTEGER],
    **{key: [5, True, [], "{", "[]", {"type": "strin"}] for key in ("guided_json", "json_schema")},
    **{key: ["", "a(", 5, ["a"], "a" * 8193] for key in ("guided_regex", "regex")},
    "guided_choice": [[], [""], ["a", 5], "a", ["a"] * 1001],
    **{key: ["", "nonsense", 5, {}] for key in ("guided_grammar", "ebnf")},
    "grammar": ["nonsense", 5, {}, "x" * 16_385],
    "logprob_token_ids": [[-1], [259], [2**80], ["1"], [1.0], [True], 5, "a", [1] * 129],
    "ignore_eos": ["true", 1, []],
    "include_stop_str_in_output": ["true", 1],
    "skip_special_tokens": ["true", 0],
    "repetition_detection": [5, [], {"max_pattern_size": -1}, {"max_pattern_size": 2}, {"min_pattern_size": 1}]
    + [{"max_pattern_size": size, "min_count": 2} for size in (257, 2.0)]
    + [{"max_pattern_size": 2, "min_count": count} for count in (1, 2**63)]
    + [{"max_pattern_size": 2, "min_count": 2, "min_pattern_size": 3}],
    "thinking_token_budget": [0, 5, -2, 2**63, *NOT_AN_INTEGER],  # for a model without reasoning
    "cache_salt": [5, [], "x" * 257],
    "request_id": [5, [], "", "a b", "x" * 129],
    "stream": ["true", 1, {}],
    "stream_interval": [0, -1, 2**63, *NOT_AN_INTEGER],
}


def post(url: str, path: str, fields: dict[str, Any]) -> httpx.Response:
    """Post a request whose values httpx refuses to encode."""
    body = json.dumps(MINIMAL[path] | fields)
    return httpx.post(url + path, content=body, headers={"content-type": "application/json"})


@pytest.mark.checklist("C06", "C07", "C08", "C09", "C10", "C11", "C13")
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", [COMPLETIONS, pytest.param(CHAT, marks=pytest.mark.long)])
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
    assert server.model.client.num_in_flight == 0


NO_OPTIONS: list[Any] = [{"include_usage": 1}, {"include_usage": "true"}, [], "a", 5, {"continuous_usage_stats": []}]

# fields -> the parameter that is named
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"samplers": ["min_p"], "mirostat": 1}, "samplers"),
    ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"post_sampling_probs": True}, "post_sampling_probs"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids"),
    ({"allowed_token_ids": [3, 256], "stop_token_ids": [3], "min_tokens": 1}, "allowed_token_ids"),
    *(({"samplers": ["min_p", name]}, "samplers[1]") for name in ("penalty", "mirostat", "e", "")),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    *(({"truncation_side": side, "truncate_prompt_tokens": 3}, "truncation_side") for side in ("middle", "", 5, True)),
    *(({"stream_options": {"include_usage": True}, "stream": stream}, "stream_options") for stream in (False, None)),
    *(({"stream": True, "stream_options": wrong}, "stream_options") for wrong in NO_OPTIONS),
]
ACCEPTED: list[dict[str, Any]] = [
    {"min_tokens": 5, "max_tokens": 5},
    *({"stream": True, "stream_options": options} for options in (None, {}, {"include_obfuscation": False})),
    {"stream": True, "stream_options": {"include_usage": None}},
]


@pytest.mark.checklist("C15")
@pytest.mark.parametrize("path", BOTH)
def test_fields_that_do_not_fit_one_another(server: RunningServer, path: str) -> None:
    for fields, param in REFUSED:
        error = check_error(ask(server.url, path, **fields), 400)
        assert error["param"].split(".")[0] == param, fields
        assert param != "samplers[1]" or "'penalties', 'dry', 'top_n_sigma'" in error["message"]
    for fields in ACCEPTED:
        assert ask(server.url, path, **fields).status_code == 200, fields


@pytest.mark.checklist("C01")
@pytest.mark.parametrize("path", BOTH)
def test_wording_is_openais(server: RunningServer, path: str) -> None:
    """Clients match on it; tests/server/http/test_invalid_bodies.py has the other messages."""
    error = check_error(ask(server.url, path, n=130), 400)
    message = "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 130 instead."
    assert (error["message"], error["param"], error["code"]) == (message, "n", "integer_above_max_value")


@pytest.mark.parametrize("path", BOTH)
def test_missing_fields(server: RunningServer, path: str) -> None:
    for name in MINIMAL[path].keys() - {"model"}:  # the only one need not be named
        body = {key: value for key, value in MINIMAL[path].items() if key != name}
        error = check_error(httpx.post(server.url + path, json=body), 400)
        assert error["message"] == f"Missing required parameter: '{name}'."
        assert (error["param"], error["code"]) == (name, "missing_required_parameter")


@pytest.mark.checklist("C01")
@pytest.mark.parametrize("path", BOTH)
def test_model_name(server: RunningServer, path: str) -> None:
    for name in ("tiny", "org/tiny"):
        assert ask_json(server.url, path, model=name)["model"] == name
    for name in ("gpt-4o", "Tiny", "tiny ", "x" * 10_000):
        error = check_error(ask(server.url, path, model=name), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "does not exist" in error["message"]
        assert len(error["message"]) < 300
    for wrong in (5, True, ["tiny"]):
        check_error(ask(server.url, path, model=wrong), 400)


def test_best_of(server: RunningServer) -> None:
    assert check_error(ask(server.url, COMPLETIONS, best_of=1, n=2), 400)["param"] == "best_of"
    assert ask(server.url, COMPLETIONS, best_of=20, max_tokens=1).status_code == 200
    assert ask(server.url, COMPLETIONS, best_of=2, n=2, stream=True).status_code == 200
    assert check_error(ask(server.url, CHAT, best_of=2), 400)["code"] == "unsupported_parameter"
