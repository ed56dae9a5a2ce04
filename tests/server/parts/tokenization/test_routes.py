"""Tokens of texts, and prompts as the engine would receive them."""

import httpx
import jinja2
import msgspec

from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, ask, ask_json
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import IM_END_ID, MAX_MODEL_LEN, chatml


def tokenize(server: RunningServer, **body: object) -> httpx.Response:
    return httpx.post(server.url + "/tokenize", json=body, timeout=20)


def test_a_prompt(server: RunningServer) -> None:
    expected = {"count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": [*"hé".encode()], "token_strs": None}
    assert tokenize(server, model="tiny", prompt="hé").json() == expected
    assert tokenize(server, prompt="").json()["tokens"] == []
    answer = tokenize(server, prompt="h<|im_end|>", return_token_strs=True).json()
    assert (answer["tokens"], answer["token_strs"]) == ([104, IM_END_ID], ["h", "<|im_end|>"])


def test_messages(server: RunningServer) -> None:
    """Text of users is no control token."""
    messages = [{"role": "user", "content": "<|im_end|>"}]
    for fields, opened in (({}, True), ({"add_generation_prompt": False}, False)):
        tokens = tokenize(server, messages=messages, **fields).json()["tokens"]
        assert tokens == chatml(("user", "<|im_end|>"), opened=opened)


def test_there_and_back(server: RunningServer) -> None:
    text = "Grüße, 世界 🙂 <|im_start|>\n"
    tokens = tokenize(server, prompt=text).json()["tokens"]
    assert server.metric("lightwell_tokenizer_seconds_count") == 1
    response = httpx.post(server.url + "/detokenize", json={"model": "org/tiny", "tokens": tokens})
    assert response.json() == {"prompt": text}


def test_tokenizer_info(server: RunningServer) -> None:
    info = httpx.get(server.url + "/tokenizer_info").json()
    tokenizer = server.model.tokenizer
    assert (info["bos_token"], info["eos_token"], info["add_bos_token"]) == (None, "<|endoftext|>", False)
    assert tokenize(server, prompt=info["eos_token"]).json()["tokens"] == [tokenizer.eos_token_id]
    assert (info["model_max_length"], info["vocab_size"]) == (MAX_MODEL_LEN, tokenizer.vocab_size)
    rendered = jinja2.Environment().from_string(info["chat_template"]).render(messages=MESSAGES)
    asked = tokenize(server, messages=MESSAGES, add_generation_prompt=False)
    assert tokenizer.encode(rendered) == asked.json()["tokens"]


def test_a_long_text_is_counted_as_a_whole(server: RunningServer) -> None:
    long = "Hi there. " * 10_000
    for body in ({"prompt": long}, {"messages": [{"role": "user", "content": long}]}):
        assert tokenize(server, **body).json()["count"] >= len(long)


# `POST .../render` returns what the engine would receive for the same request.


SAMPLING_PARAMS = (
    "max_tokens pooling seed temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty "
    "logit_bias allowed_token_ids bad_words chain min_tokens ignore_eos stop_token_ids repetition_detection logprobs "
    "logprob_token_ids prompt_logprobs grammar thinking post_sampling_probs"
)
SETTINGS = {"temperature": 0.5, "top_k": 3, "seed": 7, "logit_bias": {"65": 1}, "stop_token_ids": [66], "n": 2}


def test_a_conversation(server: RunningServer) -> None:
    answer = ask(server.url, f"{CHAT}/render", wish=1, **SETTINGS)
    assert answer.headers["x-lightwell-warnings"] == "ignored parameters: wish"
    assert "x-lightwell-seed" not in answer.headers
    rendered = answer.json()
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


def test_a_prompt_that_is_rendered_takes_no_seed(start_server: StartServer) -> None:
    servers = [start_server(seed=1) for _ in range(2)]
    ask_json(servers[1].url, f"{CHAT}/render")
    assert len({ask(server.url, COMPLETIONS).headers["x-lightwell-seed"] for server in servers}) == 1
