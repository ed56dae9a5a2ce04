"""Default sampling: its sources and their precedence, on all endpoints, and where it is reported."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.shared.messages import SamplingParams
from server.schemas.default_sampling import DefaultSampling, resolve_default_sampling
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, RESPONSES, ask, ask_json
from tests.support.serving import RunningServer, fresh_server

FILE = "generation_config.json"
Start = Callable[..., RunningServer]
SetDefault = Callable[[DefaultSampling], None]

ENDPOINTS = (COMPLETIONS, CHAT, RESPONSES, ANTHROPIC)


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
    yield partial(object.__setattr__, server.model, "default_sampling")
    object.__setattr__(server.model, "default_sampling", before)


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
    for fields, expected in (({}, (0.25, 0.75)), ({"temperature": 0.5}, (0.5, 0.75))):
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
    (rendered,) = ask(server.url, f"{COMPLETIONS}/render", prompt=["Hi"]).json()
    assert rendered["sampling_params"]["temperature"] == 0.0


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
    for path in (COMPLETIONS, CHAT, RESPONSES):
        name = "max_output_tokens" if path == RESPONSES else "max_tokens"
        assert params(limited, path).max_tokens == params(limited, path, **{name: None}).max_tokens == 7
        assert params(limited, path, **{name: 9}).max_tokens == 9
        num_prompt_tokens = len(limited.engine.submits[-1].prompt_token_ids)
        assert params(server, path).max_tokens == (16 if path == COMPLETIONS else 2048 - num_prompt_tokens)
    assert params(limited, COMPLETIONS, prompt="a" * 2044).max_tokens == 4  # no more than fits
    assert (card(limited)["default_max_tokens"], card(server)["default_max_tokens"]) == (7, None)
