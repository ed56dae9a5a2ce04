"""The pipeline up to the engine: `POST .../render` returns what the engine would receive for the same request."""

import msgspec
import pytest

from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, ask, ask_json
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import chatml

SAMPLING_PARAMS = (
    "max_tokens pooling seed temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty "
    "logit_bias allowed_token_ids bad_words chain min_tokens ignore_eos stop_token_ids repetition_detection logprobs "
    "logprob_token_ids prompt_logprobs grammar thinking post_sampling_probs"
)
SETTINGS = {"temperature": 0.5, "top_k": 3, "seed": 7, "logit_bias": {"65": 1}, "stop_token_ids": [66], "n": 2}


def test_a_conversation(server: RunningServer) -> None:
    rendered = ask_json(server.url, f"{CHAT}/render", **SETTINGS)
    assert server.engine.submits == []
    ask_json(server.url, CHAT, **SETTINGS)
    (submit,) = server.engine.submits
    assert rendered.pop("request_id").startswith("chatcmpl-")
    values = msgspec.json.decode(msgspec.json.encode(msgspec.structs.astuple(submit.params)))
    params = dict(zip(SAMPLING_PARAMS.split(), values, strict=True))
    assert list(rendered["sampling_params"]) == SAMPLING_PARAMS.split()
    assert (params["seed"], params["logit_bias"], params["stop_token_ids"]) == (7, {"65": 1.0}, [66])
    assert rendered == {
        "model": "tiny",
        "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "token_ids": submit.prompt_token_ids,
        "max_tokens": submit.params.max_tokens,
        "sampling_params": params,
    }
    assert rendered["token_ids"] == chatml(("user", "Hi"))
    assert rendered["max_tokens"] == 2048 - len(rendered["token_ids"])


def test_prompts(server: RunningServer) -> None:
    rendered = ask(server.url, f"{COMPLETIONS}/render", prompt=[[72, 105], [256]], max_tokens=9).json()
    assert [(each["prompt"], each["token_ids"], each["max_tokens"]) for each in rendered] == [
        ("Hi", [72, 105], 9),
        ("<|endoftext|>", [256], 9),
    ]
    assert [each["sampling_params"]["seed"] for each in rendered] == [None, None]
    (one,) = ask(server.url, f"{COMPLETIONS}/render", prompt="é", seed=3).json()
    assert (one["token_ids"], one["max_tokens"], one["sampling_params"]["seed"]) == ([0xC3, 0xA9], 16, 3)


def test_it_changes_nothing(start_server: StartServer) -> None:
    """Rendering does not advance the sequence of seeds that the server's seed determines."""
    seeds = []
    for rendered in (False, True):
        server = start_server(seed=5)
        if rendered:
            ask_json(server.url, f"{CHAT}/render")
        seeds.append(ask(server.url, CHAT).headers["x-lightwell-seed"])
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_is_refused_is_refused_here(server: RunningServer, path: str) -> None:
    for fields, status in (({"temperature": 3}, 400), ({"model": "x"}, 404), ({"max_tokens": 0, "echo": False}, 400)):
        error = check_error(ask(server.url, f"{path}/render", **fields), status)
        assert error == check_error(ask(server.url, path, **fields), status)


def test_unknown_fields_are_reported(server: RunningServer) -> None:
    headers = ask(server.url, f"{CHAT}/render", wish=1, messages=MESSAGES).headers
    assert headers["x-lightwell-warnings"] == "ignored parameters: wish"
    assert "x-lightwell-seed" not in headers
