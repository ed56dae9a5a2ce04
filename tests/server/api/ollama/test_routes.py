"""Ollama's API over real sockets, with a fake engine, and the calls of Open WebUI's Ollama connection."""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.support.clients import shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, raw_request, wait_until
from tests.support.tool_model import CALL, TOOLS, say, write_tool_model

MESSAGES = [{"role": "user", "content": "Hi"}]
REPLY = "Hello, world!"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=True)
    with shared_server(folder, vocab_size=263) as server:
        yield server


@pytest.fixture(autouse=True)
def reply(server: RunningServer) -> None:
    say(server, REPLY)


def ask(server: RunningServer, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/api/{path}", json={"model": "tiny"} | fields)


def answer_of(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    response = ask(server, path, stream=False, **fields)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), response.text
    answer: dict[str, Any] = response.json()
    return answer


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson"), response.text
    return [json.loads(line) for line in response.text.splitlines()]


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def prompt_of(server: RunningServer) -> str:
    return server.model.tokenizer.decode(server.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)


# Chat.


def test_a_stream_and_the_whole_answer(server: RunningServer) -> None:
    *pieces, last = lines_of(ask(server, "chat", messages=MESSAGES))
    whole = answer_of(server, "chat", messages=MESSAGES)
    assert "".join(line["message"]["content"] for line in pieces) == whole["message"]["content"] == REPLY
    assert not any(line["done"] for line in pieces)
    assert last["done"] is whole["done"] is True
    assert last["done_reason"] == whole["done_reason"] == "stop"
    for name in ("prompt_eval_count", "eval_count"):
        assert last[name] == whole[name] > 0
    for name in ("total_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(last[name], int)
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"]
    assert datetime.fromisoformat(last["created_at"]).tzinfo is not None


def test_names_of_models(server: RunningServer) -> None:
    for name in ("tiny", "tiny:latest", "org/tiny:latest", "Tiny", "TINY:Latest"):
        assert answer_of(server, "chat", model=name, messages=MESSAGES)["model"] == name
    assert "tiny:7b" in error_of(ask(server, "chat", model="tiny:7b", messages=MESSAGES), 404)


def test_tools_and_thinking(server: RunningServer) -> None:
    say(server, f"<think>Hm.</think>Well: {CALL}")
    whole = answer_of(server, "chat", messages=MESSAGES, tools=TOOLS)["message"]
    assert (whole["thinking"], whole["content"].strip()) == ("Hm.", "Well:")
    (call,) = whole["tool_calls"]
    assert call["function"] == {"index": 0, "name": "weather", "arguments": {"city": "東京"}}
    lines = lines_of(ask(server, "chat", messages=MESSAGES, tools=TOOLS))
    (streamed,) = [call for line in lines for call in line["message"].get("tool_calls", ())]
    assert streamed["function"] == call["function"]
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Hm."

    say(server, "Rain.")
    history = [*MESSAGES, whole, {"role": "tool", "tool_name": "weather", "content": "11 degrees"}]
    assert answer_of(server, "chat", messages=history, tools=TOOLS)["message"]["content"] == "Rain."
    prompt = prompt_of(server)
    assert "<think>Hm.</think>" in prompt
    assert '{"name": "weather", "arguments": {"city": "東京"}}' in prompt
    assert "11 degrees" in prompt


def test_thinking_is_turned_on_and_off(server: RunningServer) -> None:
    answer_of(server, "chat", messages=MESSAGES, think=True)
    assert prompt_of(server).endswith("<think>\n")
    answer_of(server, "chat", messages=MESSAGES, think=False)
    assert not prompt_of(server).endswith("<think>\n")


def test_options_reach_the_engine(server: RunningServer) -> None:
    options = {"num_predict": 3, "top_k": 4, "temperature": 0.5, "seed": 7, "repeat_penalty": 1.1, "min_p": 0.2}
    answer = answer_of(server, "chat", messages=MESSAGES, options=options)
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 3)
    params = server.engine.submits[-1].params
    assert (params.max_tokens, params.top_k, params.temperature, params.seed) == (3, 4, 0.5, 7)
    assert (params.repetition_penalty, params.min_p) == (1.1, 0.2)
    whole = answer_of(server, "chat", messages=MESSAGES, options={"stop": ["wor"], "num_predict": -1})
    assert whole["message"]["content"] == "Hello, "


def test_many_stop_strings_and_more_tokens_than_fit(server: RunningServer) -> None:
    options = {"stop": [*"123456789", "wor"], "num_predict": 10**6}
    response = ask(server, "chat", messages=MESSAGES, stream=False, options=options)
    assert response.json()["message"]["content"] == "Hello, "
    assert "options.num_predict capped at" in response.headers["x-lightwell-warnings"]


def test_a_format_constrains_the_answer(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"city": {"const": "Rome"}}}
    for format in ("json", schema):
        answer_of(server, "chat", messages=MESSAGES, format=format)
        assert server.engine.submits[-1].params.grammar is not None
    assert "Rome" in str(server.engine.submits[-1].params.grammar)
    assert "'format" in error_of(ask(server, "chat", messages=MESSAGES, format={"not": {}}), 400)


def test_log_probabilities(server: RunningServer) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = answer_of(server, "chat", messages=MESSAGES, **fields)["logprobs"]
    lines = lines_of(ask(server, "chat", messages=MESSAGES, **fields))
    assert "".join(token["token"] for token in whole).startswith(REPLY)
    assert [token["token"] for line in lines for token in line.get("logprobs", ())] == [t["token"] for t in whole]
    assert {len(token["top_logprobs"]) for token in whole} == {2}


def test_what_is_ignored_is_named(server: RunningServer) -> None:
    fields = {"options": {"num_ctx": 9, "num_gpu": 1}, "keep_alive": "5m", "shift": True}
    warnings = ask(server, "chat", messages=MESSAGES, **fields).headers["x-lightwell-warnings"]
    assert set(warnings.partition(": ")[2].split(", ")) == {"options.num_ctx", "options.num_gpu", "keep_alive", "shift"}


def test_errors_have_ollamas_form_and_names(server: RunningServer) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"options": {"temperature": "3"}}, "'options.temperature'"),
        ({"options": {"num_predict": "x"}}, "'options.num_predict'"),
        ({"options": {"stop": [7]}}, "'options.stop[0]'"),
        ({"think": "very"}, "very"),
        ({"messages": [{"role": "user", "content": "?", "images": ["aGk="]}]}, "messages[0].images"),
        ({"messages": 7}, "'messages'"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"n": 2}, "'n'"),
    ]
    for fields, name in wrong:
        assert name in error_of(ask(server, "chat", **({"messages": MESSAGES} | fields)), 400)
    assert "JSON" in error_of(httpx.post(f"{server.url}/api/chat", content=b"{"), 400)
    error_of(httpx.get(f"{server.url}/api/nothing"), 404)
    error_of(httpx.get(f"{server.url}/api/chat"), 405)


def test_an_error_in_a_stream_is_its_last_line(server: RunningServer) -> None:
    server.engine.config.fail_request = True
    try:
        *_, last = lines_of(ask(server, "chat", messages=MESSAGES))
        error_of(ask(server, "chat", messages=MESSAGES, stream=False), 500)
    finally:
        server.engine.config.fail_request = False
    assert list(last) == ["error"]


def test_a_disconnect_aborts_the_request(server: RunningServer) -> None:
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01
    try:
        with server.connect() as connection:
            body = json.dumps({"model": "tiny", "messages": MESSAGES, "options": {"num_predict": 1000}}).encode()
            connection.sendall(raw_request("POST", "/api/chat", body))
            assert b"200 OK" in connection.recv(4096)
            num_aborts = len(server.engine.aborts)
        wait_until(lambda: len(server.engine.aborts) > num_aborts)
    finally:
        server.engine.config.endless, server.engine.config.step_seconds = False, 0.0


# Generate.


def test_a_prompt_is_a_chat_unless_it_is_raw(server: RunningServer) -> None:
    whole = answer_of(server, "generate", prompt="Hi", system="Be brief.")
    assert whole["response"] == REPLY
    assert prompt_of(server) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    raw = answer_of(server, "generate", prompt="<|im_start|>Hi", raw=True)
    assert (raw["response"], prompt_of(server), "context" in raw) == (REPLY, "<|im_start|>Hi", False)
    *pieces, _ = lines_of(ask(server, "generate", prompt="Hi"))
    assert "".join(line["response"] for line in pieces) == REPLY


def test_a_context_continues_a_conversation(server: RunningServer) -> None:
    whole = answer_of(server, "generate", prompt="Hi")
    first = prompt_of(server)
    streamed = lines_of(ask(server, "generate", prompt="Hi"))[-1]
    assert whole["context"] == streamed["context"]
    answer_of(server, "generate", prompt="Ho", context=whole["context"])
    assert prompt_of(server).startswith(first + REPLY)
    assert prompt_of(server).endswith("<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n")
    assert "'context'" in error_of(ask(server, "generate", prompt="Ho", context=[10**6]), 400)


def test_a_suffix_needs_a_model_that_knows_it(server: RunningServer) -> None:
    assert "'suffix'" in error_of(ask(server, "generate", prompt="a", suffix="b"), 400)


def test_generated_log_probabilities(server: RunningServer) -> None:
    for raw in (False, True):
        fields = {"prompt": "Hi", "raw": raw, "logprobs": True, "top_logprobs": 1}
        tokens = answer_of(server, "generate", **fields)["logprobs"]
        assert "".join(token["token"] for token in tokens).startswith(REPLY)
        assert {len(token["top_logprobs"]) for token in tokens} == {1}


def test_a_prompt_that_is_too_long(server: RunningServer) -> None:
    message = error_of(ask(server, "generate", prompt="a" * 5000), 400)
    assert "prompt resulted in" in message


@pytest.mark.parametrize(("path", "text"), [("chat", "message"), ("generate", "response")])
def test_without_a_prompt_the_model_is_loaded(server: RunningServer, path: str, text: str) -> None:
    num_submits = len(server.engine.submits)
    for fields, reason in (({}, "load"), ({"keep_alive": "10m"}, "load"), ({"keep_alive": 0}, "unload")):
        response = ask(server, path, **fields)
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        assert (answer["done"], answer["done_reason"], text in answer) == (True, reason, True)
        assert ("keep_alive" in response.headers.get("x-lightwell-warnings", "")) == bool(fields)
    error_of(ask(server, path, model="other"), 404)
    assert len(server.engine.submits) == num_submits


# Embeddings.


def test_embeddings(server: RunningServer) -> None:
    one, several = answer_of(server, "embed", input="Hi"), answer_of(server, "embed", input=["Hi", "Ho"])
    reference = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": ["Hi", "Ho"]}).json()
    assert several["embeddings"] == [each["embedding"] for each in reference["data"]]
    assert one["embeddings"] == several["embeddings"][:1]
    assert several["prompt_eval_count"] == reference["usage"]["prompt_tokens"]
    assert several["total_duration"] > 0
    assert answer_of(server, "embeddings", prompt="Hi") == {"embedding": one["embeddings"][0]}
    assert len(answer_of(server, "embed", input="Hi", dimensions=2)["embeddings"][0]) == 2
    assert answer_of(server, "embed", input=[])["embeddings"] == answer_of(server, "embed")["embeddings"] == []
    assert answer_of(server, "embeddings")["embedding"] == []


def test_long_texts_are_truncated_at_their_end(server: RunningServer) -> None:
    text = "a" * 1500 + "b" * 1500
    assert answer_of(server, "embed", input=text)["prompt_eval_count"] == server.engine.config.max_model_len
    assert prompt_of(server) == text[: server.engine.config.max_model_len]
    assert "maximum context length" in error_of(ask(server, "embed", input=text, truncate=False), 400)


# Other operations.


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", name) for name in ("pull", "push", "create", "copy")),
        *(("DELETE", "delete"), ("POST", "blobs/sha256:00")),
    ],
)
def test_operations_on_files_are_refused(server: RunningServer, method: str, path: str) -> None:
    response = httpx.request(method, f"{server.url}/api/{path}", json={"model": "x"})
    assert path.partition("/")[0] in error_of(response, 501)
    assert response.headers["x-should-retry"] == "false"


def test_heads(server: RunningServer) -> None:
    paths = {"/": 200, "/api/version": 200, "/api/tags": 200, "/api/blobs/x": 501}  # `ollama` probes the first
    assert {path: httpx.head(server.url + path).status_code for path in paths} == paths


def test_the_version_is_a_number_for_clients_that_compare_it(server: RunningServer) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", httpx.get(f"{server.url}/api/version").json()["version"])


@pytest.mark.checklist("A12")
def test_curl_needs_no_content_type_but_web_pages_do(server: RunningServer) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": False})
    form = {"content-type": "application/x-www-form-urlencoded"}
    for headers in ({}, form, {"content-type": "text/plain"}):
        assert httpx.post(f"{server.url}/api/chat", content=body, headers=headers).status_code == 200
    page = {**form, "origin": "http://localhost:3000"}
    error_of(httpx.post(f"{server.url}/api/chat", content=body, headers=page), 415)
    assert httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=form).status_code == 415


def test_a_key_is_needed(start_server: StartServer) -> None:
    server = start_server(api_key=("key",))
    for method, path in (("GET", "tags"), ("GET", "ps"), ("GET", "version"), ("POST", "chat"), ("POST", "pull")):
        error_of(httpx.request(method, f"{server.url}/api/{path}", json={}), 401)
    assert httpx.get(f"{server.url}/api/tags", headers={"authorization": "Bearer key"}).status_code == 200


def test_strict_servers_refuse_what_others_ignore(start_server: StartServer) -> None:
    server = start_server(strict=True)
    for fields in ({"keep_alive": 5}, {"options": {"num_ctx": 9}}):
        assert next(iter(fields)) in error_of(ask(server, "chat", messages=MESSAGES, **fields), 400)
    assert ask(server, "chat", messages=MESSAGES).status_code == 200


def test_requests_are_counted_by_route(start_server: StartServer, fake_engine: FakeEngine) -> None:
    server = start_server()
    ask(server, "chat", messages=MESSAGES)
    ask(server, "pull")
    for handler, status in (("/api/chat", "200"), ("/api/pull", "501")):
        assert server.metric("http_requests_total", handler=handler, method="POST", status=status) == 1


# Open WebUI, as its source (open_webui/routers/ollama.py and open_webui/utils/payload.py) calls an Ollama connection.


def test_open_webui(server: RunningServer) -> None:
    """Verify the connection, list models, look at one, chat with tools, embed, and unload."""
    headers = {"content-type": "application/json", "authorization": "Bearer key", "x-openwebui-user-name": "a"}
    with httpx.Client(base_url=server.url, headers=headers) as client:

        def post(path: str, payload: dict[str, Any]) -> httpx.Response:
            response = client.post(path, content=json.dumps(payload))
            assert response.status_code == 200, response.text
            return response

        version = client.get("/api/version").json()["version"]
        assert tuple(map(int, re.sub(r"^v|-.*", "", version).split("."))) > (0, 1, 33)
        names = [model["model"] for model in client.get("/api/tags").json()["models"]]
        loaded = {model["model"]: model["expires_at"] for model in client.get("/api/ps").json()["models"]}
        assert names[0] in loaded
        assert int(datetime.fromisoformat(loaded[names[0]]).timestamp()) > 0
        assert post("/api/show", {"model": names[0]}).json()["model_info"]

        say(server, f"Hm.</think>{CALL}")
        history = [
            {"role": "user", "content": "Weather?"},
            {
                **{"role": "assistant", "content": "", "thinking": "Hm."},
                "tool_calls": [
                    {"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
                ],
            },
            {"role": "tool", "content": "Rain.", "tool_call_id": "call_1"},
            {"role": "user", "content": "And in Tokyo?"},
        ]
        options = {
            **{"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "seed": 1, "stop": ["\n\n\n"]},
            **{"mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0, "repeat_last_n": 64, "repeat_penalty": 1.1},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "num_predict": 128, "num_ctx": 2048, "num_keep": 24},
            **{"num_batch": 512, "num_gpu": 1, "num_thread": 2, "use_mmap": True, "use_mlock": False},
        }
        payload = {"model": names[0], "messages": history, "stream": True, "tools": TOOLS, "options": options}
        payload |= {"keep_alive": "5m", "think": True}
        lines = lines_of(post("/api/chat", payload))
        calls = [call for line in lines for call in line["message"].get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls] == ["weather"]
        assert all(call["id"] for call in calls)
        assert (lines[-1]["done"], lines[-1]["done_reason"]) == (True, "stop")
        assert lines[-1]["prompt_eval_count"] + lines[-1]["eval_count"] > 0

        say(server, '{"title": "x"}')
        title = {"model": names[0], "messages": MESSAGES, "stream": False, "options": {"num_predict": 50}}
        schema = {"type": "object", "properties": {"title": {"type": "string"}}}
        assert post("/api/chat", {**title, "format": schema}).json()["message"]["content"] == '{"title": "x"}'
        say(server, REPLY)
        assert len(post("/api/embed", {"model": names[0], "input": ["a", "b"]}).json()["embeddings"]) == 2
        embedding = {"model": names[0], "prompt": "a", "options": {}, "keep_alive": 60}
        assert post("/api/embeddings", embedding).json()["embedding"]
        *_, last = lines_of(post("/api/generate", {"model": names[0], "prompt": "Hi", "stream": True}))
        assert last["done"]
        unloaded = post("/api/generate", {"model": names[0], "keep_alive": 0, "prompt": ""}).json()
        assert unloaded["done_reason"] == "unload"
        refused = client.post("/api/pull", content=json.dumps({"model": "x", "insecure": True}))
        assert error_of(refused, 501)


def test_options_out_of_range_are_named(server: RunningServer, start_server: StartServer) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "options": {"temperature": 5, "top_p": 1.5, "min_p": 0.5}}
    answer = ask(server, "chat", **fields)
    names = "options.temperature.5, options.top_p.1.5"
    assert (answer.status_code, answer.headers["x-lightwell-warnings"]) == (200, f"ignored parameters: {names}")
    assert server.engine.submits[-1].params.temperature == 2
    assert "options.temperature.5" in error_of(ask(start_server(strict=True), "chat", **fields), 400)
