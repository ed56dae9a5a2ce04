"""Conversion of Ollama's requests to chat completions, completions and embeddings."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from server.api.ollama.conversion import (
    OPTIONS,
    RANGES,
    embed_request,
    embeddings_request,
    generate_to_chat,
    generate_to_completion,
    ignored_names,
    keep_alive_seconds,
    tagged_name,
    to_chat,
)
from server.api.ollama.schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
)
from server.http.errors import BadRequestError
from tests.support.growth import num_calls

MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def fields_of(converted: BaseModel) -> dict[str, Any]:
    """Return the fields that are set, without those that are always the same."""
    fields = converted.model_dump(exclude_unset=True, by_alias=True)
    del fields["model"]
    return fields


def chat(*, reads_effort: bool = True, **fields: Any) -> dict[str, Any]:
    body = OllamaChatRequest.model_validate({"model": "tiny:latest", "messages": MESSAGES} | fields)
    return fields_of(to_chat(body, "tiny", reads_effort=reads_effort))


def generate(**fields: Any) -> OllamaGenerateRequest:
    return OllamaGenerateRequest.model_validate({"model": "tiny", "prompt": "Hi"} | fields)


def test_streaming_is_the_default() -> None:
    assert chat() == {"messages": MESSAGES, "stream": True}
    assert chat(stream=None)["stream"] is True
    assert chat(stream=False)["stream"] is False


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


def test_other_options_are_ignored_and_named() -> None:
    options = {"num_ctx": 4096, "num_keep": 4, "tfs_z": 1.0, "num_gpu": None, "seed": 1}
    body = OllamaChatRequest.model_validate({"model": "tiny", "options": options, "keep_alive": "5m"})
    assert ignored_names(body) == ["options.num_ctx", "options.num_keep", "options.tfs_z", "keep_alive"]
    assert chat(options=options, keep_alive=0)["options.num_ctx"] is True  # reported as unknown fields are


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("temperature", 5, 2),
        ("top_p", 1.5, 1),
        ("min_p", -1, 0),
        ("typical_p", 0, 1),
        ("typical_p", -0.5, 0.01),
        ("repeat_penalty", 0, 1),
        ("repeat_penalty", 11.0, 10),
        ("presence_penalty", 3, 2),
        ("frequency_penalty", -(10**400), -2),
        ("mirostat", 3, 2),
        ("mirostat", -1.0, 0),
        ("mirostat_tau", 1e9, 1000),
        ("mirostat_eta", -0.1, 0),
        ("top_k", 40.5, 40),
        ("top_k", -2, -1),
        ("repeat_last_n", -7, -1),
        ("top_k", math.inf, 2**63 - 1),
    ],
)
def test_options_out_of_range_get_the_nearest_value_and_are_named(name: str, value: float, used: float) -> None:
    converted = chat(options={name: value, "seed": 1})
    assert converted[name] == used
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


def test_formats() -> None:
    assert "response_format" not in chat(format="") | chat(format=None)
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    named = chat(format=SCHEMA)["response_format"]
    assert (named["type"], named["json_schema"]["schema"]) == ("json_schema", SCHEMA)
    assert chat(format={})["response_format"]["json_schema"]["schema"] == {}


@pytest.mark.parametrize(("think", "effort"), [(True, "medium"), (False, "none"), ("low", "low"), ("max", "max")])
def test_thinking(think: bool | str, effort: str) -> None:
    assert chat(think=think)["reasoning_effort"] == effort
    without = chat(think=think, reads_effort=False)
    assert "reasoning_effort" not in without
    assert ("think" in without) == bool(think)  # named as ignored


def test_a_conversation_with_tools() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    messages = [
        {"role": "User", "content": "Add."},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call, {"function": {"name": "sub"}}]},
        {"role": "tool", "content": "1", "tool_name": "sub"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "tool_calls": [call | {"id": "own"}]},
        {"role": "tool", "content": "4", "tool_call_id": "own"},
    ]
    user, assistant, sub, add, last, own = chat(messages=messages)["messages"]
    assert user == {"role": "user", "content": "Add."}
    assert (assistant["reasoning_content"], assistant["content"]) == ("Hm.", "")
    ids = [each["id"] for each in assistant["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)  # as Mistral's templates require
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": "é"}
    assert json.loads(assistant["tool_calls"][1]["function"]["arguments"]) == {}
    assert sub == {"role": "tool", "content": "1", "name": "sub", "tool_call_id": ids[1]}
    assert add == {"role": "tool", "content": "3", "tool_call_id": ids[0]}
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
        calls = [{"function": {"name": "add"}}] * 1000
        asked = [{"role": "assistant", "tool_calls": calls}] * (num_calls // 1000)
        request = {"messages": [*asked, *[{"role": "tool", "tool_name": "sub", "content": "1"}] * num_calls]}
        body = OllamaChatRequest.model_validate({"model": "m", **request})
        return lambda: to_chat(body, "m")

    assert num_calls(prepare(4000)) < 3 * num_calls(prepare(2000))


def test_tools() -> None:
    function = {"name": "add", "parameters": SCHEMA}
    assert chat(tools=[{"function": function}])["tools"] == [{"type": "function", "function": function}]
    assert "tools" not in chat(tools=[])


def test_a_prompt_becomes_a_chat() -> None:
    assert generate_to_chat(generate(), "tiny").model_dump(exclude_unset=True)["messages"] == MESSAGES
    system, user = fields_of(generate_to_chat(generate(system="Be brief."), "tiny"))["messages"]
    assert (system, user) == ({"role": "system", "content": "Be brief."}, MESSAGES[0])


def test_a_raw_prompt_becomes_a_completion() -> None:
    body = generate_to_completion(generate(raw=True, logprobs=True, top_logprobs=2), "tiny")
    assert fields_of(body) == {"prompt": ["Hi"], "stream": True, "logprobs": 2}
    assert (body.default_max_output_tokens, body.wants_timings) == (None, True)
    assert fields_of(generate_to_completion(generate(suffix="end", system="Be brief."), "tiny")) == {
        **{"prompt": ["Hi"], "suffix": "end", "stream": True},
        "system": True,  # named as ignored
    }


def test_no_images() -> None:
    assert chat(messages=[MESSAGES[0] | {"images": []}])["messages"] == MESSAGES


def test_embeddings() -> None:
    def embed(**fields: Any) -> dict[str, Any]:
        body = OllamaEmbedRequest.model_validate({"model": "tiny", "input": "a"} | fields)
        return fields_of(embed_request(body, "tiny"))

    assert embed() == {"input": ["a"], "truncate_prompt_tokens": -1, "truncation_side": "right"}
    assert embed(truncate=False, dimensions=3) == {"input": ["a"], "dimensions": 3}
    assert embed(input=["a", "b"], truncate=False, dimensions=0) == {"input": ["a", "b"]}
    assert embed(truncate=False, options={"temperature": 1})["options.temperature"] is True
    older = OllamaEmbeddingsRequest.model_validate({"model": "tiny", "prompt": "a"})
    assert fields_of(embeddings_request(older, "tiny")) == {"input": ["a"]}


def test_names_get_a_tag() -> None:
    names = ["tiny", "org/tiny", "host:80/tiny", "tiny:135m"]
    tagged = ["tiny:latest", "org/tiny:latest", "host:80/tiny:latest", "tiny:135m"]
    assert [tagged_name(name) for name in names] == tagged


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
