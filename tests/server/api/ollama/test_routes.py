"""Ollama's API over real sockets, with a fake engine."""

import json
import re
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.server.api.contract import OLLAMA_CHAT, OLLAMA_GENERATE
from tests.server.api.dialects import REPLY, ask, ask_events, ask_json, error_of, prompt_of
from tests.support.clients import CHAT, MESSAGES
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import CALL, TOOLS, say

EMBED, EMBEDDINGS = "/api/embed", "/api/embeddings"
TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

# Chat.


def test_a_stream_and_the_whole_answer(server: RunningServer) -> None:
    *pieces, last = ask_events(server, OLLAMA_CHAT)
    whole = ask_json(server, OLLAMA_CHAT)
    assert not any(line["done"] for line in pieces)
    assert last["done"] is whole["done"] is True
    for name in ("prompt_eval_count", "eval_count"):
        assert last[name] == whole[name] > 0
    for name in ("total_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(last[name], int)
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"]
    assert datetime.fromisoformat(last["created_at"]).tzinfo is not None


def test_names_of_models(server: RunningServer) -> None:
    for name in ("tiny", "tiny:latest", "org/tiny:latest", "Tiny", "TINY:Latest"):
        assert ask_json(server, OLLAMA_CHAT, model=name)["model"] == name
    assert "tiny:7b" in error_of(OLLAMA_CHAT, ask(server, OLLAMA_CHAT, model="tiny:7b"), 404)


def test_tools_and_thinking(tools: RunningServer) -> None:
    say(tools, f"<think>Hm.</think>Well: {CALL}")
    whole = ask_json(tools, OLLAMA_CHAT, tools=TOOLS)["message"]
    assert (whole["thinking"], whole["content"].strip()) == ("Hm.", "Well:")
    (call,) = whole["tool_calls"]
    assert call["function"] == {"index": 0, "name": "weather", "arguments": {"city": "東京"}}
    lines = ask_events(tools, OLLAMA_CHAT, tools=TOOLS)
    (streamed,) = [call for line in lines for call in line["message"].get("tool_calls", ())]
    assert streamed["function"] == call["function"]
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Hm."
    history = [*MESSAGES, whole, {"role": "tool", "tool_call_id": call["id"], "content": "11 degrees"}]
    ask_json(tools, OLLAMA_CHAT, messages=history, tools=TOOLS)
    for part in ("<think>Hm.</think>", '{"name": "weather", "arguments": {"city": "東京"}}', "11 degrees"):
        assert part in prompt_of(tools)
    for think in (True, False):
        ask_json(tools, OLLAMA_CHAT, think=think)
        assert prompt_of(tools).endswith("<think>\n") == think


def test_options_reach_the_engine(server: RunningServer) -> None:
    options = {"num_predict": 3, "top_k": 4, "temperature": 5, "seed": 7, "repeat_penalty": 1.1, "min_p": 0.2}
    assert ask_json(server, OLLAMA_CHAT, options=options)["eval_count"] == 3
    params = server.engine.submits[-1].params
    assert (params.max_tokens, params.top_k, params.temperature, params.seed) == (3, 4, 2, 7)
    assert (params.repetition_penalty, params.min_p) == (1.1, 0.2)
    schema = {"type": "object", "properties": {"city": {"const": "Rome"}}}
    for format in ("json", schema):
        ask_json(server, OLLAMA_CHAT, format=format)
        assert server.engine.submits[-1].params.grammar is not None
    assert "Rome" in str(server.engine.submits[-1].params.grammar)


@pytest.mark.parametrize(
    ("path", "fields"), [(OLLAMA_CHAT, {}), (OLLAMA_GENERATE, {}), (OLLAMA_GENERATE, {"raw": True})]
)
def test_log_probabilities(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    fields |= {"logprobs": True, "top_logprobs": 2}
    whole = ask_json(server, path, **fields)["logprobs"]
    lines = ask_events(server, path, **fields)
    assert "".join(token["token"] for token in whole).startswith(REPLY)
    assert [token["token"] for line in lines for token in line.get("logprobs", ())] == [t["token"] for t in whole]
    assert {len(token["top_logprobs"]) for token in whole} == {2}


def test_errors_of_requests_that_are_none(server: RunningServer) -> None:
    assert "JSON" in error_of(OLLAMA_CHAT, httpx.post(server.url + OLLAMA_CHAT, content=b"{"), 400)
    error_of(OLLAMA_CHAT, httpx.get(f"{server.url}/api/nothing"), 404)
    error_of(OLLAMA_CHAT, httpx.get(server.url + OLLAMA_CHAT), 405)


# Generate.


def test_a_prompt_is_a_chat_unless_it_is_raw(server: RunningServer) -> None:
    ask_json(server, OLLAMA_GENERATE, system="Be brief.")
    assert prompt_of(server) == f"<|im_start|>system\nBe brief.<|im_end|>\n{TURN}"
    raw = ask_json(server, OLLAMA_GENERATE, prompt="<|im_start|>Hi", raw=True)
    assert (raw["response"], prompt_of(server), "context" in raw) == (REPLY, "<|im_start|>Hi", False)


def test_a_context_continues_a_conversation(server: RunningServer) -> None:
    whole = ask_json(server, OLLAMA_GENERATE)
    assert whole["context"] == ask_events(server, OLLAMA_GENERATE)[-1]["context"]
    ask_json(server, OLLAMA_GENERATE, prompt="Ho", context=whole["context"])
    assert prompt_of(server).startswith(TURN + REPLY)
    assert prompt_of(server).endswith("<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("path", "prompt", "text"), [(OLLAMA_CHAT, "messages", "message"), (OLLAMA_GENERATE, "prompt", "response")]
)
def test_without_a_prompt_the_model_is_loaded(server: RunningServer, path: str, prompt: str, text: str) -> None:
    for fields, reason in (({}, "load"), ({"keep_alive": "10m"}, "load"), ({"keep_alive": 0}, "unload")):
        response = ask(server, path, **{prompt: ..., "stream": ...}, **fields)
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        assert (answer["done"], answer["done_reason"], text in answer) == (True, reason, True)
        assert ("keep_alive" in response.headers.get("x-lightwell-warnings", "")) == bool(fields)
    error_of(path, ask(server, path, **{prompt: ...}, model="other"), 404)
    assert server.engine.submits == []


# Embeddings.


def test_embeddings(server: RunningServer) -> None:
    one, several = ask_json(server, EMBED, input="Hi"), ask_json(server, EMBED, input=["Hi", "Ho"])
    reference = ask_json(server, "/v1/embeddings", input=["Hi", "Ho"])
    assert several["embeddings"] == [each["embedding"] for each in reference["data"]]
    assert one["embeddings"] == several["embeddings"][:1]
    assert several["prompt_eval_count"] == reference["usage"]["prompt_tokens"]
    assert several["total_duration"] > 0
    assert ask_json(server, EMBEDDINGS, prompt="Hi") == {"embedding": one["embeddings"][0]}
    assert len(ask_json(server, EMBED, input="Hi", dimensions=2)["embeddings"][0]) == 2
    assert ask_json(server, EMBED, input=[])["embeddings"] == ask_json(server, EMBED)["embeddings"] == []
    assert ask_json(server, EMBEDDINGS)["embedding"] == []


def test_long_texts_are_truncated_at_their_end(server: RunningServer) -> None:
    text, max_model_len = "a" * 1500 + "b" * 1500, server.engine.config.max_model_len
    assert ask_json(server, EMBED, input=text)["prompt_eval_count"] == max_model_len
    assert prompt_of(server) == text[:max_model_len]
    assert "maximum context length" in error_of(EMBED, ask(server, EMBED, input=text, truncate=False), 400)


# Other operations.


def test_operations_on_files_are_refused(server: RunningServer) -> None:
    posts = ("pull", "push", "create", "copy", "blobs/sha256:00")
    for method, path in (*(("POST", name) for name in posts), ("DELETE", "delete")):
        response = httpx.request(method, f"{server.url}/api/{path}", json={"model": "x"})
        assert path.partition("/")[0] in error_of("/api/", response, 501)
        assert response.headers["x-should-retry"] == "false"
    assert server.metric("http_requests_total", handler="/api/pull", method="POST", status="501") == 1


def test_heads_and_the_version(server: RunningServer) -> None:
    paths = {"/": 200, "/api/version": 200, "/api/tags": 200, "/api/blobs/x": 501}  # `ollama` probes the first
    assert {path: httpx.head(server.url + path).status_code for path in paths} == paths
    assert re.fullmatch(r"\d+\.\d+\.\d+", httpx.get(f"{server.url}/api/version").json()["version"])


@pytest.mark.checklist("A12")
def test_curl_needs_no_content_type_but_web_pages_do(server: RunningServer) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": False})
    form = {"content-type": "application/x-www-form-urlencoded"}
    for headers in ({}, form, {"content-type": "text/plain"}):
        assert httpx.post(server.url + OLLAMA_CHAT, content=body, headers=headers).status_code == 200
    page = {**form, "origin": "http://localhost:3000"}
    error_of(OLLAMA_CHAT, httpx.post(server.url + OLLAMA_CHAT, content=body, headers=page), 415)
    check_error(httpx.post(server.url + CHAT, content=body, headers=form), 415)


def test_a_key_is_needed(keyed: RunningServer) -> None:
    for method, path in (("GET", "tags"), ("GET", "ps"), ("GET", "version"), ("POST", "chat"), ("POST", "pull")):
        error_of("/api/", httpx.request(method, f"{keyed.url}/api/{path}", json={}), 401)
    assert httpx.get(f"{keyed.url}/api/tags", headers={"authorization": "Bearer key-a"}).status_code == 200
