"""/tokenize and /detokenize over real sockets, with bytes as tokens."""

import os
import subprocess
import sysconfig

import httpx
import jinja2
import pytest

from tests.conformance.table import ENVIRONMENTS
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import IM_END_ID, MAX_MODEL_LEN, chatml

LM_EVAL = ENVIRONMENTS / "lm-eval" / "bin" / "python"


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
    for text in ("hi", "<|im_end|>"):
        messages = [{"role": "user", "content": text}]
        for fields, opened in (({}, True), ({"add_generation_prompt": False}, False)):
            assert tokenize(server, messages=messages, **fields).json()["tokens"] == chatml(
                ("user", text), opened=opened
            )


def test_there_and_back(server: RunningServer) -> None:
    text = "Grüße, 世界 🙂 <|im_start|>\n"
    tokens = tokenize(server, prompt=text).json()["tokens"]
    response = httpx.post(server.url + "/detokenize", json={"model": "org/tiny", "tokens": tokens})
    assert response.json() == {"prompt": text}


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


@pytest.mark.long
@pytest.mark.skipif(not LM_EVAL.exists(), reason="`make test-long` installs lm-eval")
def test_the_remote_tokenizer_of_lm_eval(server: RunningServer) -> None:
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [str(LM_EVAL), "-c", LM_EVAL_TOKENIZER, server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
