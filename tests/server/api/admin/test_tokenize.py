"""/tokenize and /detokenize over real sockets, with bytes as tokens."""

import os
import subprocess
import sysconfig

import httpx
import jinja2
import pytest

from server.api.admin.schemas import MAX_DETOKENIZE_TOKENS
from server.api.admin.tokenize import MAX_TEXT_BYTES
from tests.conformance.table import ENVIRONMENTS
from tests.server.conftest import StartServer
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import IM_END_ID, IM_START_ID, MAX_MODEL_LEN

LM_EVAL = ENVIRONMENTS / "lm-eval" / "bin" / "python"


def tokenize(server: RunningServer, **body: object) -> httpx.Response:
    return httpx.post(server.url + "/tokenize", json=body, timeout=20)


def test_a_prompt(server: RunningServer) -> None:
    response = tokenize(server, model="tiny", prompt="hé")
    assert response.json() == {
        "count": 3,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": list("hé".encode()),
        "token_strs": None,
    }
    assert tokenize(server, prompt="").json()["tokens"] == []
    assert tokenize(server, prompt="<|im_end|>").json()["tokens"] == [IM_END_ID]


def test_token_strs(server: RunningServer) -> None:
    assert tokenize(server, prompt="h<|im_end|>", return_token_strs=True).json()["token_strs"] == [
        "h",
        "<|im_end|>",
    ]


def test_messages(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    turn = [IM_START_ID, *b"user\nhi", IM_END_ID, *b"\n"]
    assert tokenize(server, messages=messages, add_generation_prompt=False).json()["tokens"] == turn
    opened = [*turn, IM_START_ID, *b"assistant\n"]
    assert tokenize(server, messages=messages).json()["tokens"] == opened


def test_text_of_users_is_no_control_token(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}]
    tokens = tokenize(server, messages=messages, add_generation_prompt=False).json()["tokens"]
    assert tokens == [IM_START_ID, *b"user\n<|im_end|>", IM_END_ID, *b"\n"]


def test_there_and_back(server: RunningServer) -> None:
    text = "Grüße, 世界 🙂 <|im_start|>\n"
    tokens = tokenize(server, prompt=text).json()["tokens"]
    response = httpx.post(server.url + "/detokenize", json={"model": "org/tiny", "tokens": tokens})
    assert response.json() == {"prompt": text}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "messages"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": ["x"]}, 400, "prompt"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools[0].type"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ({"prompt": "x", "logits_processors": ["a"]}, 400, "logits_processors"),
        ({"prompt": "x", "truncate_prompt_tokens": 1}, 400, "truncate_prompt_tokens"),
        ({"prompt": "x" * (MAX_TEXT_BYTES + 1)}, 400, "prompt"),
        ({"messages": [{"role": "user", "content": "ü" * (MAX_TEXT_BYTES // 2 + 1)}]}, 400, "messages"),
    ],
)
def test_refused(server: RunningServer, body: dict[str, object], status: int, param: str) -> None:
    assert check_error(tokenize(server, **body), status)["param"] == param


@pytest.mark.parametrize("tokens", [[-1], [259], [2**40], [1.5], [True], ["1"], "abc", None])
def test_detokenize_refuses(server: RunningServer, tokens: object) -> None:
    error = check_error(httpx.post(server.url + "/detokenize", json={"tokens": tokens}), 400)
    assert error["param"].startswith("tokens")


def test_too_many_tokens(server: RunningServer) -> None:
    error = check_error(httpx.post(server.url + "/detokenize", json={"tokens": [1] * (MAX_DETOKENIZE_TOKENS + 1)}), 400)
    assert (error["param"], error["code"]) == ("tokens", "array_above_max_length")


BODIES: dict[str, dict[str, object]] = {
    "/tokenize": {"messages": [{"role": "user", "content": "x", "mood": 1}], "promt": 1},
    "/detokenize": {"tokens": [120], "promt": 1},
}


@pytest.mark.parametrize("path", BODIES)
def test_unknown_fields(start_server: StartServer, path: str) -> None:
    server = start_server()
    answer = httpx.post(server.url + path, json=BODIES[path])
    names = "promt, messages[].mood" if path == "/tokenize" else "promt"
    assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: {names}"
    assert server.metric("lightwell_unknown_parameters_total") == len(names.split(", "))
    strict = httpx.post(start_server(strict=True).url + path, json=BODIES[path])
    assert check_error(strict, 400)["message"] == "Unrecognized request argument supplied: promt"


def test_time_is_observed(server: RunningServer) -> None:
    tokenize(server, prompt="x")
    assert server.metric("lightwell_tokenizer_seconds_count") == 1


def test_tokenizer_info(server: RunningServer) -> None:
    info = httpx.get(server.url + "/tokenizer_info").json()
    tokenizer = server.model.tokenizer
    assert (info["bos_token"], info["eos_token"], info["add_bos_token"]) == (None, "<|endoftext|>", False)
    assert tokenize(server, prompt=info["eos_token"]).json()["tokens"] == [tokenizer.eos_token_id]
    assert (info["model_max_length"], info["vocab_size"]) == (MAX_MODEL_LEN, tokenizer.vocab_size)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = jinja2.Environment().from_string(info["chat_template"]).render(messages=messages)
    asked = tokenize(server, messages=messages, add_generation_prompt=False)
    assert tokenizer.encode(rendered) == asked.json()["tokens"]


LM_EVAL_TOKENIZER = """
import sys
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

url = sys.argv[1] + "/v1/completions"
assert check_remote_tokenizer_support(url)
tokenizer = RemoteTokenizer(url)
assert tokenizer.encode("h<|im_end|>") == [104, tokenizer.encode("<|im_end|>")[0]]
assert tokenizer.decode(tokenizer.encode("h\\u00e9<|im_end|>")) == "h\\u00e9<|im_end|>"
assert tokenizer.eos_token_id == tokenizer.eot_token == tokenizer.encode("<|endoftext|>")[0]
assert (tokenizer.bos_token_id, tokenizer.pad_token) == (None, None)
text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
assert text == "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", text
"""


@pytest.mark.skipif(not LM_EVAL.exists(), reason="`make test-long` installs lm-eval")
def test_the_remote_tokenizer_of_lm_eval(server: RunningServer) -> None:
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [str(LM_EVAL), "-c", LM_EVAL_TOKENIZER, server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
