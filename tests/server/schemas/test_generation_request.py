"""Parameters that completions and chats share: what is refused by name, in OpenAI's words, and default sampling."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.shared.messages import SamplingParams
from server.schemas.sampling import DefaultSampling, resolve_default_sampling
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, MINIMAL, RESPONSES, ask, ask_json
from tests.support.serving import RunningServer, check_error, fresh_server, is_served

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
    "json_schema": [5, True, [], "{", "[]", {"type": "strin"}],
    "regex": ["", "a(", 5, ["a"], "a" * 8193],
    "ebnf": ["", "nonsense", 5, {}],
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
@pytest.mark.parametrize(
    ("path", "name"),
    [
        *((COMPLETIONS, name) for name in BAD),
        *(pytest.param(CHAT, name, marks=pytest.mark.long) for name in BAD if name != "best_of"),
    ],
)
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


# Default sampling: its sources and their precedence, on all endpoints, and where it is reported.

FILE = "generation_config.json"
Start = Callable[..., RunningServer]
SetDefault = Callable[[DefaultSampling], None]

ENDPOINTS = [*filter(is_served, (COMPLETIONS, CHAT, RESPONSES, ANTHROPIC))]


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a server whose model has this generation_config.json: `start({"top_k": 5}, seed=1)`."""
    with ExitStack() as stack:

        def start(generation: dict[str, Any] | None = None, **settings: Any) -> RunningServer:
            folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
            shutil.copytree(model_folder, folder)
            if generation is not None:
                (folder / FILE).write_text(json.dumps(generation))
            return stack.enter_context(fresh_server(folder, **settings))

        yield start


@pytest.fixture
def set_default(server: RunningServer) -> Iterator[SetDefault]:
    """A function that gives the shared server another default sampling for one test."""
    before = server.model.default_sampling

    def set_to(value: DefaultSampling) -> None:
        object.__setattr__(server.model, "default_sampling", value)
        vars(server.model).pop("variants", None)  # which know their fingerprints

    yield set_to
    set_to(before)


def resolve(setting: Any, *recommendations: tuple[str, dict[str, Any]], name: str = "m") -> DefaultSampling:
    return resolve_default_sampling(setting, {name}, recommendations)


def params(server: RunningServer, path: str = CHAT, **fields: Any) -> SamplingParams:
    """Send a request and return the parameters that reached the engine."""
    ask_json(server.url, path, **fields)
    return server.engine.submits[-1].params


def card(server: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/models/tiny").json()
    return found


def fingerprint(server: RunningServer) -> str:
    return str(ask_json(server.url, COMPLETIONS)["system_fingerprint"])


def test_request_before_setting_before_file_before_openai(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Answers report what applied, and the server from where it comes."""
    with caplog.at_level("INFO"):
        recommended = {"temperature": 0.25, "top_p": 0.5, "top_k": 11}
        server = start(recommended, default_sampling={"top_p": 0.75, "min_p": 0.125})
    for path in ENDPOINTS:
        for absent in ({}, {"temperature": None, "top_p": None}):
            found = params(server, path, **absent)
            assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.25, 0.75, 11, 0.125)
            assert found.repetition_penalty == 1
        found = params(server, path, temperature=1.0, top_p=1.0)
        assert (found.temperature, found.top_p, found.top_k) == (1.0, 1.0, 11)
    for fields, expected in (({}, (0.25, 0.75)), ({"temperature": 0.5}, (0.5, 0.75))) if RESPONSES in ENDPOINTS else ():
        answer = ask_json(server.url, RESPONSES, **fields)
        assert (answer["temperature"], answer["top_p"]) == expected
    file, setting = "generation_config.json", "--default-sampling"
    logged = f"default sampling: top_p 0.75, min_p 0.125 ({setting}), temperature 0.25, top_k 11 ({file})"
    assert logged in caplog.text
    reported = {
        "default_sampling": {"temperature": 0.25, "top_p": 0.75, "top_k": 11, "min_p": 0.125},
        "default_sampling_sources": {"temperature": file, "top_p": setting, "top_k": file, "min_p": setting},
    }
    assert reported.items() <= card(server).items()
    assert reported.items() <= httpx.get(f"{server.url}/version").json().items()


def test_names_of_other_models_are_reported(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"top_p": 0.5}
    server = start(default_sampling={"temperature": 0.5, "tiny": fields, "Tiny": fields, "other": "none"})
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("--default-sampling: no effect for Tiny, other, which is none of this model's names (")
    assert "tiny" in warning.split("(")[1]
    assert card(server)["default_sampling"] == {"temperature": 0.5, "top_p": 0.5}


def test_none_is_openais(start: Start, server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    recommended = {"temperature": 0.25, "top_p": 0.5, "top_k": 11, "repetition_penalty": 1.5}
    with caplog.at_level("INFO"):
        none = start(recommended, default_sampling="none")
    for each in (none, server):
        assert params(each, COMPLETIONS, seed=3) == SamplingParams(max_tokens=16, seed=3)
        assert card(each)["default_sampling"] == {}
    assert "default sampling: OpenAI's (temperature 1, top_p 1)" in caplog.text
    assert fingerprint(none) == fingerprint(server)


def test_other_defaults_have_another_fingerprint(server: RunningServer, set_default: SetDefault) -> None:
    plain = fingerprint(server)
    found = []
    for sampling in (resolve({"temperature": 0.5}), resolve({"temperature": 0.6}), resolve({"top_p": 0.5})):
        set_default(sampling)
        found.append(fingerprint(server))
    assert len({plain, *found}) == 4
    set_default(resolve(None, ("file", {"temperature": 0.5})))
    assert fingerprint(server) == found[0]


def test_do_sample_false_is_greedy(start: Start) -> None:
    server = start({"do_sample": False, "temperature": 0.7, "top_k": 5})
    assert (params(server).temperature, params(server).top_k) == (0.0, 0)
    assert params(server, temperature=0.7).temperature == 0.7


def test_every_sampler_has_a_default(server: RunningServer, set_default: SetDefault) -> None:
    """A default is what the request's own field would be, with all that follows from it."""
    fields: dict[str, Any] = {
        **{"typical_p": 0.9, "top_n_sigma": 2.0, "xtc_probability": 0.5, "dry_multiplier": 0.8},
        **{"dry_sequence_breakers": ["a"], "repeat_last_n": 64, "frequency_penalty": 0.5, "presence_penalty": -0.5},
        "samplers": ["top_k", "temperature"],
    }
    plain, given = params(server, seed=1), params(server, seed=1, **fields)
    set_default(resolve(fields))
    assert params(server, seed=1) == given != plain


def test_a_default_does_not_apply_beside_the_field_that_replaces_it(
    server: RunningServer, set_default: SetDefault
) -> None:
    set_default(resolve({"mirostat": 2, "repetition_penalty": 1.5}))
    assert params(server, repeat_penalty=1.1).repetition_penalty == 1.1
    assert params(server).order[-1] == "mirostat"
    assert params(server, samplers=["top_k"]).order == ("top_k",)
    assert params(server, mirostat=0).extra_samplers is None
    set_default(resolve({"samplers": ["top_k"], "repeat_penalty": 1.5}))
    assert params(server).repetition_penalty == 1.5
    assert params(server, repetition_penalty=1.1).repetition_penalty == 1.1
    assert params(server, mirostat=2).order[-1] == "mirostat"


def test_settings_of_models() -> None:
    setting = {"temperature": 0.5, "m": {"top_p": 0.9, "temperature": 0.4}, "other": {"top_k": 1}, "plain": "none"}
    recommended = ("file", {"top_k": 7})
    assert resolve(setting, recommended).values == {"top_p": 0.9, "temperature": 0.4, "top_k": 7}
    assert resolve(setting, recommended, name="other").values == {"top_k": 1, "temperature": 0.5}
    assert resolve(setting, recommended, name="plain").values == {}
    assert resolve(setting, recommended, name="unnamed").values == {"temperature": 0.5, "top_k": 7}


def test_the_first_recommendation_has_precedence() -> None:
    found = resolve(None, ("file", {"top_p": 0.8}), ("card", {"temperature": 0.2, "top_p": 0.9}))
    assert found.values == {"top_p": 0.8, "temperature": 0.2}
    assert str(found) == "top_p 0.8 (file), temperature 0.2 (card)"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 2.5}, "temperature': decimal above maximum value. Expected a value <= 2, but got 2.5"),
        ({"samplers": ["top_k"], "mirostat": 2}, "'samplers': not allowed with 'mirostat'"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "'repeat_penalty': it is an alias"),
        ({"samplers": ["top_x"]}, "'top_x'. Supported values are: 'penalties', 'dry'"),
        ({"temprature": 0.5}, "unknown field 'temprature' .fields: .*temperature, top_p"),
        ({"m": {"seed": 5}}, "unknown field 'seed'"),
    ],
)
def test_invalid_settings_name_field_and_limit(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^--default-sampling: .*{message}"):
        resolve(setting)


def test_invalid_recommendations_can_be_ignored() -> None:
    for field, value in (("temperature", -1), ("top_k", -2), ("top_p", 1.5), ("repetition_penalty", 0.0)):
        with pytest.raises(ValueError, match=rf"^file: Invalid .*'{field}'.*\(--default-sampling none ignores it\)"):
            resolve(None, ("file", {field: value}))
        assert resolve("none", ("file", {field: value})) == DefaultSampling()


def test_default_max_tokens(start: Start, server: RunningServer) -> None:
    limited = start(default_max_tokens=7)
    for path in ENDPOINTS[:3]:
        name = "max_output_tokens" if path == RESPONSES else "max_tokens"
        assert params(limited, path).max_tokens == params(limited, path, **{name: None}).max_tokens == 7
        assert params(limited, path, **{name: 9}).max_tokens == 9
        num_prompt_tokens = len(limited.engine.submits[-1].prompt_token_ids)
        assert params(server, path).max_tokens == (16 if path == COMPLETIONS else 2048 - num_prompt_tokens)
    assert params(limited, COMPLETIONS, prompt="a" * 2044).max_tokens == 4  # no more than fits
    assert (card(limited)["default_max_tokens"], card(server)["default_max_tokens"]) == (7, None)
