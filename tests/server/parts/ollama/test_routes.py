"""Ollama's API over real sockets, with a fake engine, and the conversion of its requests and answers."""

import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.errors import BadRequestError
from server.parts.ollama.conversion import OPTIONS, RANGES, ignored_names, keep_alive_seconds, to_chat
from server.parts.ollama.part import short_number
from server.parts.ollama.schemas import OllamaChatRequest
from tests.server.api.completions.test_routes import between
from tests.server.conftest import StartServer
from tests.server.dialects import REPLY, WARNINGS, ask_events, error_of, prompt_of
from tests.support.clients import CHAT, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE, ask, ask_json, shared_server
from tests.support.fake_engine import make_adapter
from tests.support.growth import num_calls
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import CALL, TEMPLATE, TOOLS, say, write_tool_model

EMBED, EMBEDDINGS, SHOW = "/api/embed", "/api/embeddings", "/api/show"
TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

# Chat.


def test_counts_and_durations(server: RunningServer) -> None:
    last, whole = ask_events(server.url, OLLAMA_CHAT)[-1], ask_json(server.url, OLLAMA_CHAT)
    for name in ("prompt_eval_count", "eval_count"):
        assert last[name] == whole[name] > 0
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"] > 0


def test_names_of_models(server: RunningServer) -> None:
    for name in ("tiny", "tiny:latest", "org/tiny:latest", "Tiny", "TINY:Latest"):
        assert ask_json(server.url, OLLAMA_CHAT, model=name)["model"] == name
    assert "tiny:7b" in error_of(OLLAMA_CHAT, ask(server.url, OLLAMA_CHAT, model="tiny:7b"), 404)


def test_tools_and_thinking(tools: RunningServer) -> None:
    say(tools, f"<think>Hm.</think>Well: {CALL}")
    for answers in ([ask_json(tools.url, OLLAMA_CHAT, tools=TOOLS)], ask_events(tools.url, OLLAMA_CHAT, tools=TOOLS)):
        (call,) = [call for answer in answers for call in answer["message"].get("tool_calls", ())]
        assert call["function"] == {"index": 0, "name": "weather", "arguments": {"city": "東京"}}
        texts = ["".join(each["message"].get(name, "") for each in answers) for name in ("thinking", "content")]
        assert (texts[0], texts[1].strip()) == ("Hm.", "Well:")


@pytest.mark.parametrize(
    ("path", "fields"), [(OLLAMA_CHAT, {}), (OLLAMA_GENERATE, {}), (OLLAMA_GENERATE, {"raw": True})]
)
def test_log_probabilities(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    fields |= {"logprobs": True, "top_logprobs": 2}
    for answers in ([ask_json(server.url, path, **fields)], ask_events(server.url, path, **fields)):
        tokens = [token for answer in answers for token in answer.get("logprobs", ())]
        assert "".join(token["token"] for token in tokens) == f"{REPLY}<|endoftext|>"
        assert {len(token["top_logprobs"]) for token in tokens} == {2}


def test_errors_of_requests_that_are_none(server: RunningServer, keyed: RunningServer) -> None:
    assert "JSON" in error_of(OLLAMA_CHAT, httpx.post(server.url + OLLAMA_CHAT, content=b"{"), 400)
    error_of(OLLAMA_CHAT, httpx.get(f"{server.url}/api/nothing"), 404)
    error_of(OLLAMA_CHAT, httpx.get(server.url + OLLAMA_CHAT), 405)
    error_of(OLLAMA_CHAT, ask(keyed.url, OLLAMA_CHAT), 401)


# Generate.


def test_a_prompt_is_a_chat_unless_it_is_raw(server: RunningServer) -> None:
    ask_json(server.url, OLLAMA_GENERATE, system="Be brief.")
    assert prompt_of(server) == f"<|im_start|>system\nBe brief.<|im_end|>\n{TURN}"
    raw = ask_json(server.url, OLLAMA_GENERATE, prompt="<|im_start|>Hi", raw=True)
    assert (raw["response"], prompt_of(server), "context" in raw) == (REPLY, "<|im_start|>Hi", False)
    assert server.engine.submits[-1].params.max_tokens == 2048 - 3  # only the context limits it
    assert raw["total_duration"] > 0


def test_a_context_continues_a_conversation(server: RunningServer) -> None:
    whole = ask_json(server.url, OLLAMA_GENERATE)
    assert whole["context"] == ask_events(server.url, OLLAMA_GENERATE)[-1]["context"]
    ask_json(server.url, OLLAMA_GENERATE, prompt="Ho", context=whole["context"])
    assert prompt_of(server).startswith(TURN + REPLY)
    assert prompt_of(server).endswith("<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("path", "prompt", "text"), [(OLLAMA_CHAT, "messages", "message"), (OLLAMA_GENERATE, "prompt", "response")]
)
def test_without_a_prompt_the_model_is_loaded(server: RunningServer, path: str, prompt: str, text: str) -> None:
    for fields, reason in (({}, "load"), ({"keep_alive": "10m"}, "load"), ({"keep_alive": 0}, "unload")):
        response = ask(server.url, path, **{prompt: ..., "stream": ...}, **fields)
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        assert (answer["done"], answer["done_reason"], text in answer) == (True, reason, True)
        assert ("keep_alive" in response.headers.get("x-lightwell-warnings", "")) == bool(fields)
    error_of(path, ask(server.url, path, **{prompt: ...}, model="other"), 404)
    assert server.engine.submits == []


# Embeddings.


def test_embeddings(server: RunningServer) -> None:
    one, several = ask_json(server.url, EMBED, input="Hi"), ask_json(server.url, EMBED, input=["Hi", "Ho"])
    reference = ask_json(server.url, "/v1/embeddings", input=["Hi", "Ho"])
    assert several["embeddings"] == [each["embedding"] for each in reference["data"]]
    assert one["embeddings"] == several["embeddings"][:1]
    assert several["prompt_eval_count"] == reference["usage"]["prompt_tokens"]
    assert several["total_duration"] > 0
    assert ask_json(server.url, EMBEDDINGS, prompt="Hi") == {"embedding": one["embeddings"][0]}
    for dimensions, size in ((2, 2), (0, 64)):
        assert len(ask_json(server.url, EMBED, input="Hi", dimensions=dimensions)["embeddings"][0]) == size
    assert ask_json(server.url, EMBED, input=[])["embeddings"] == ask_json(server.url, EMBED)["embeddings"] == []
    assert ask_json(server.url, EMBEDDINGS)["embedding"] == []


def test_long_texts_are_truncated_at_their_end(server: RunningServer) -> None:
    text = "a" * 1500 + "b" * 1500
    assert ask_json(server.url, EMBED, input=text)["prompt_eval_count"] == 2048
    assert prompt_of(server) == text[:2048]
    assert "maximum context length" in error_of(EMBED, ask(server.url, EMBED, input=text, truncate=False), 400)


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


# Descriptions of the served models.


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("secret-path"), special_tags=True)
    adapters = [make_adapter("sql", "/secret-path/sql")]
    with shared_server(folder, adapters=adapters, max_loras=1, vocab_size=263) as server:
        yield server


def test_models(described: RunningServer) -> None:
    listed, loaded = (httpx.get(f"{described.url}/api/{path}").json()["models"] for path in ("tags", "ps"))
    tiny, organization, sql = listed
    assert [model["name"] for model in listed] == ["tiny:latest", "org/tiny:latest", "sql:latest"]
    assert tiny["model"] == tiny["name"]
    assert tiny["capabilities"] == ["completion", "tools", "thinking"]
    assert tiny["digest"] == organization["digest"] != sql["digest"]
    assert sql["details"] == {**tiny["details"], "parent_model": "tiny:latest"}
    assert [model["model"] for model in loaded] == [model["model"] for model in listed]
    assert {model["context_length"] for model in loaded} == {described.engine.config.max_model_len}
    assert all(datetime.fromisoformat(model["expires_at"]).timestamp() > 0 for model in loaded)
    assert {model["size_vram"] for model in loaded} == {0}  # the fake engine's device is a CPU


def test_properties_of_a_model(described: RunningServer, model_folder: Path) -> None:
    shown = ask_json(described.url, SHOW, model="tiny:latest")
    assert shown == ask_json(described.url, SHOW, model=..., name="tiny")
    assert shown["template"] == TEMPLATE
    config, info = json.loads((model_folder / "config.json").read_text()), shown["model_info"]
    architecture = info["general.architecture"]
    assert info[f"{architecture}.embedding_length"] == config["hidden_size"]
    assert info[f"{architecture}.context_length"] == described.engine.config.max_model_len
    assert shown["details"]["family"] == architecture


def test_the_default_sampling_is_shown_by_ollamas_names(start_server: StartServer) -> None:
    server = start_server(default_sampling={"temperature": 0.6, "repetition_penalty": 1.1, "top_n_sigma": 1.0})
    lines = ask_json(server.url, SHOW)["parameters"].splitlines()
    assert [line.split() for line in lines] == [["temperature", "0.6"], ["repeat_penalty", "1.1"]]


def test_no_paths_are_revealed(described: RunningServer) -> None:
    answers = [ask(described.url, SHOW, model=name) for name in ("tiny", "sql", "other")]
    answers += [httpx.get(f"{described.url}/api/{path}") for path in ("tags", "ps", "version")]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 200, 200]
    for answer in answers:
        assert "secret-path" not in answer.text + str(answer.headers)


def test_short_numbers() -> None:
    numbers = [999, 1500, 134_515_008, 8_000_000, 8_030_261_248, 70_000_000_000]
    assert [short_number(number) for number in numbers] == ["999", "2K", "134.52M", "8M", "8.0B", "70B"]


# Conversion of requests.


def variant(*, reads_effort: bool = True) -> Any:
    """Return a model whose chat template reads `reasoning_effort`, or does not."""
    template = SimpleNamespace(options={"reasoning_effort"} if reads_effort else set())
    return SimpleNamespace(name="tiny", base=SimpleNamespace(chat_template=template))


def chat(*, reads_effort: bool = True, **fields: Any) -> dict[str, Any]:
    """Return the fields that are set, without the model."""
    body = OllamaChatRequest.model_validate({"model": "tiny:latest", "messages": MESSAGES} | fields)
    converted = to_chat(body, variant(reads_effort=reads_effort))
    return converted.model_dump(exclude_unset=True, by_alias=True, exclude={"model"})


def test_streaming_is_the_default() -> None:
    assert chat() == {"messages": MESSAGES, "stream": True}
    assert [chat(stream=value)["stream"] for value in (None, False)] == [True, False]


def test_options_become_parameters() -> None:
    options: dict[str, Any] = {
        **{"num_predict": 5, "temperature": 0.5, "top_k": 40.0, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.7},
        **{"repeat_penalty": 1.1, "repeat_last_n": -1, "presence_penalty": 0.2, "frequency_penalty": 0.3},
        **{"seed": 7, "stop": ["a", "b"], "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    }
    assert options.keys() == OPTIONS.keys()
    converted = chat(options=options)
    assert (converted.pop("max_tokens"), converted["top_k"], type(converted["top_k"])) == (5, 40, int)
    del options["num_predict"]
    assert {name: converted[name] for name in options} == options
    for unlimited in (-1, -2, 0, None):
        assert "max_tokens" not in chat(options={"num_predict": unlimited})


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("temperature", 5, 2),
        ("typical_p", 0, 1),
        ("typical_p", -0.5, 0.01),
        ("repeat_penalty", 0, 1),
        ("frequency_penalty", -(10**400), -2),
        ("mirostat", -1.0, 0),
        ("top_k", 40.5, 40),
        ("top_k", math.inf, 2**63 - 1),
    ],
)
def test_options_out_of_range_get_the_nearest_value_and_are_named(name: str, value: float, used: float) -> None:
    assert chat(options={name: value, "seed": 1})[name] == used
    body = OllamaChatRequest.model_validate({"model": "tiny", "options": {name: value, "seed": 1.0}})
    assert ignored_names(body) == [f"options.{name}.{value}"]


def test_the_ends_of_ranges_are_valid() -> None:
    for name, ends in RANGES.items():
        for value in ends:
            if value != -math.inf:
                assert chat(options={name: value})[OPTIONS[name]] == value
        for wrong in (True, "1"):
            with pytest.raises(BadRequestError, match=OPTIONS[name]):
                chat(options={name: wrong})


def test_a_final_message_of_the_assistant_is_continued() -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    assert chat(messages=begun)["continue_final_message"] is True
    call = {"function": {"name": "f", "arguments": {}}}
    for other in ({"content": ""}, {"content": "x", "tool_calls": [call]}, {"role": "user", "content": "x"}):
        assert "continue_final_message" not in chat(messages=[*MESSAGES, {"role": "assistant"} | other])


@pytest.mark.parametrize(("think", "effort"), [(True, "medium"), (False, "none"), ("low", "low"), ("max", "max")])
def test_thinking(think: bool | str, effort: str) -> None:
    assert chat(think=think)["reasoning_effort"] == effort
    without = chat(think=think, reads_effort=False)
    assert "reasoning_effort" not in without
    assert ("think" in without) == bool(think)  # named as ignored


def test_a_conversation_with_tools() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    messages = [
        {"role": "User", "content": "Add.", "images": []},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call, {"function": {"name": "sub"}}]},
        {"role": "tool", "content": "1", "tool_name": "sub"},
        {"role": "assistant", "tool_calls": [call | {"id": "own"}]},
        {"role": "tool", "content": "4", "tool_call_id": "own"},
    ]
    user, assistant, sub, last, own = chat(messages=messages)["messages"]
    assert user == {"role": "user", "content": "Add."}
    assert (assistant["reasoning_content"], assistant["content"]) == ("Hm.", "")
    ids = [each["id"] for each in assistant["tool_calls"]]
    assert len({each for each in ids if len(each) == 9 and each.isalnum()}) == 2  # as Mistral's templates require
    arguments = [json.loads(each["function"]["arguments"]) for each in assistant["tool_calls"]]
    assert arguments == [{"a": 1, "b": "é"}, {}]
    assert sub == {"role": "tool", "content": "1", "name": "sub", "tool_call_id": ids[1]}
    assert last["tool_calls"][0]["id"] == own["tool_call_id"] == "own"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=20))
def test_a_result_answers_the_first_call_with_its_name_or_the_first_one(turns: list[tuple[bool, str]]) -> None:
    messages: list[dict[str, Any]] = []
    expected: list[str | None] = []
    waiting: list[tuple[str, str | None]] = []
    for number, (is_call, name) in enumerate(turns):
        if is_call:
            messages.append({"role": "assistant", "tool_calls": [{"id": f"id{number}", "function": {"name": name}}]})
            waiting.append((name, f"id{number}"))
        else:
            messages.append({"role": "tool", "tool_name": name, "content": "1"})
            named = [call for call in waiting if call[0] == name] or waiting or [(name, None)]
            expected.append(named[0][1])
            waiting = [call for call in waiting if call != named[0]]
    converted = chat(messages=[*messages, *MESSAGES])["messages"]
    assert [each.get("tool_call_id") for each in converted if each["role"] == "tool"] == expected


def test_the_cost_of_a_result_does_not_depend_on_the_number_of_calls() -> None:
    def prepare(num_calls: int) -> Callable[[], object]:
        asked = [{"role": "assistant", "tool_calls": [{"function": {"name": "add"}}] * 1000}] * (num_calls // 1000)
        messages = [*asked, *[{"role": "tool", "tool_name": "sub", "content": "1"}] * num_calls]
        body = OllamaChatRequest.model_validate({"model": "m", "messages": messages})
        return lambda: to_chat(body, variant())

    assert num_calls(prepare(4000)) < 3 * num_calls(prepare(2000))


def test_durations() -> None:
    seconds = {"5m": 300, "1h30m": 5400, "10s": 10, "0": 0, "0s": 0, "0h0m": 0, "1.5s": 1.5, "100ms": 0.1}
    seconds |= {"300": 300, "2.5": 2.5, "+1h": 3600, ".5m": 30, "1.h": 3600, "7us": 7e-6, "7µs": 7e-6, "7μs": 7e-6}
    for text, value in seconds.items():
        assert keep_alive_seconds(text) == pytest.approx(value)
    assert [keep_alive_seconds(value) for value in (0, 0.0, 60, 1.5)] == [0, 0, 60, 1.5]
    endless = (-1, "-1", "-1m", "999999999h", 1e300, 10**400)
    assert [keep_alive_seconds(value) for value in endless] == [math.inf] * 6
    nothing = (None, "", "-", "s", "m5", "5 m", True, "1d", ".", "--1", "1h2", "1" * 40 + "x", "1m" * 10**6)
    assert [value for value in nothing if keep_alive_seconds(value) is not None] == []


def test_text_between_prompt_and_suffix(fim: RunningServer) -> None:
    answer = ask(fim.url, "/api/generate", prompt="f(", suffix=")\n", system="Be brief.")
    assert (answer.json()["response"], answer.headers[WARNINGS]) == (REPLY, "ignored parameters: system")
    assert fim.engine.submits[-1].prompt_token_ids == between(b"f(", b")\n")
    assert "insert" in ask_json(fim.url, "/api/show")["capabilities"]
