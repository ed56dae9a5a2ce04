"""Tool calls and reasoning in the answers of `POST /v1/chat/completions`, over real sockets, with a fake engine."""

from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from tests.support.clients import (
    CHAT,
    MESSAGES,
    ask_json,
    ask_stream,
    finish_reasons,
    openai_client,
    shared_server,
)
from tests.support.serving import RunningServer
from tests.support.tool_model import CALL, TIME, TIME_CALL, TOOLS, messages_of, say, write_tool_model


def test_the_official_client_accepts_calls(model: RunningServer) -> None:
    say(model, f"One moment.\n{CALL}\n{TIME_CALL}")
    with openai_client(model.url) as client:
        fields: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS}
        answer = client.chat.completions.create(**fields)
        with client.chat.completions.stream(**fields) as stream:
            streamed = stream.get_final_completion()
    for choice in (answer.choices[0], streamed.choices[0]):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "One moment.\n"
        found = [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        assert found == [("function", "weather", '{"city": "東京"}'), ("function", "time", "{}")]
        ids = [call.id for call in choice.message.tool_calls or ()]
        assert len(set(ids)) == 2
        assert all(id.startswith("call_") for id in ids)


def test_what_the_official_client_returned_can_be_sent_back(plain: RunningServer) -> None:
    say(plain, f"<think>Hm</think>{TIME_CALL}")
    with openai_client(plain.url) as client:
        tools: Any = TOOLS
        message = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools).choices[0].message
        assert message.tool_calls
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
        history: list[Any] = [*MESSAGES, message.model_dump(), result]
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=history, tools=tools)
    assert "x-lightwell-warnings" not in raw.headers
    token_ids = plain.engine.submits[-1].prompt_token_ids
    assert (
        '<think>Hm</think>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
        in plain.model.tokenizer.decode(token_ids)
    )


def test_schema_of_an_answer_with_calls(model: RunningServer) -> None:
    say(model, TIME_CALL)
    answer = ask_json(model.url, CHAT, tools=TOOLS)
    (choice,) = answer["choices"]
    call = {"id": choice["message"]["tool_calls"][0]["id"], "type": "function"}
    call |= {"function": {"name": "time", "arguments": "{}"}}
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    assert list(choice["message"]) == ["role", "content", "refusal", "tool_calls"]
    assert choice["finish_reason"] == "tool_calls"


def test_chunks_of_a_call(plain: RunningServer) -> None:
    say(plain, CALL)
    plain.engine.config.step_seconds = 0.002  # so that each token is an event of its own
    try:
        chunks = ask_stream(plain.url, CHAT, tools=TOOLS)
    finally:
        plain.engine.config.step_seconds = 0
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    first, begin, *pieces, last = [
        (chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks
    ]
    assert first == ({"role": "assistant", "content": ""}, None)
    (call,) = begin[0]["tool_calls"]
    assert list(call) == ["index", "id", "type", "function"]
    assert (call["index"], call["type"], call["function"]["name"]) == (0, "function", "weather")
    assert '{"city": "東京"}'.startswith(call["function"]["arguments"])
    assert len(pieces) > 0
    for delta, reason in pieces:
        assert list(delta) == ["tool_calls"]
        assert delta["tool_calls"] == [
            {"index": 0, "function": {"arguments": delta["tool_calls"][0]["function"]["arguments"]}}
        ]
        assert reason is None
    assert last == ({}, "tool_calls")


# reply, fields -> content, calls, finish reason
ANSWERS: list[tuple[str, dict[str, Any], str, list[tuple[str, str]], str]] = [
    (CALL, {}, "", [("weather", '{"city": "東京"}')], "tool_calls"),
    (f"{CALL}\n{CALL}", {"n": 3}, "", [("weather", '{"city": "東京"}')] * 2, "tool_calls"),
    (f"{TIME_CALL}{TIME_CALL}", {"parallel_tool_calls": False}, TIME_CALL, [("time", "{}")], "tool_calls"),
    (TIME_CALL, {"truncate_prompt_tokens": 5}, "", [("time", "{}")], "tool_calls"),
    ("Hello", {}, "Hello", [], "stop"),
    (CALL, {"tool_choice": "none"}, CALL, [], "stop"),
    (CALL, {"tools": None}, CALL, [], "stop"),
    (CALL, {"tools": [TIME]}, CALL, [], "stop"),
    ("<tool_call>nothing</tool_call>", {}, "<tool_call>nothing</tool_call>", [], "stop"),
    # Cut off within the arguments, or before them.
    ('<tool_call>{"name": "weather", "arguments": {"city": "P', {}, "", [("weather", '{"city": "P')], "stop"),
    ('<tool_call>{"name": "weather", "argu', {}, '<tool_call>{"name": "weather", "argu', [], "stop"),
    # Stop strings match anywhere in the raw text.
    (f"{TIME_CALL} END", {"stop": "END"}, "", [("time", "{}")], "tool_calls"),
    (CALL, {"stop": "city"}, "", [("weather", '{"')], "stop"),
    (CALL, {"stop": "weather"}, '<tool_call>\n{"name": "', [], "stop"),
]


@pytest.mark.parametrize(("reply", "fields", "content", "calls", "reason"), ANSWERS)
def test_answers(
    model: RunningServer, reply: str, fields: dict[str, Any], content: str, calls: list[tuple[str, str]], reason: str
) -> None:
    """Streamed and whole answers agree and have log probabilities for each token. Control tokens are not content."""
    say(model, reply)
    fields = {"tools": TOOLS, "logprobs": True, "n": 1, **fields}
    if "<tool_call>" in model.model.tokenizer.special_tokens:
        content = content.replace("<tool_call>", "").replace("</tool_call>", "")
    answer = ask_json(model.url, CHAT, **fields)
    chunks = ask_stream(model.url, CHAT, **fields)
    streamed = messages_of(chunks)
    assert len(answer["choices"]) == len(streamed) == fields["n"]
    all_ids = []
    for index, choice in enumerate(answer["choices"]):
        assert (choice["message"]["content"] or "") == content == streamed[index]["content"]
        for message in (choice["message"], streamed[index]):
            found = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            assert found == calls
            all_ids += [call["id"] for call in message.get("tool_calls", ())]
        assert choice["finish_reason"] == reason
        parts = [
            c["logprobs"]["content"]
            for chunk in chunks
            for c in chunk["choices"]
            if c["index"] == index and c["logprobs"]
        ]
        assert [entry for part in parts for entry in part] == choice["logprobs"]["content"]
    assert finish_reasons(chunks) == {index: [reason] for index in range(fields["n"])}
    assert len(set(all_ids)) == len(all_ids)


def test_log_probabilities_are_those_of_all_tokens(model: RunningServer) -> None:
    reply = f"<think>a</think>b{CALL}c"
    say(model, reply)
    tokens = [*model.engine.config.reply, 256]
    entries = ask_json(model.url, CHAT, tools=TOOLS, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in entries] == [
        model.model.tokenizer.token_bytes(token) for token in tokens
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_every_length_has_the_beginning_of_the_whole(model: RunningServer, stream: bool) -> None:
    reply = '<think>Hm</think>Well. <tool_call>{"name": "time", "arguments": {"a": 1}}</tool_call>'
    say(model, reply)
    visible = reply.removeprefix("<think>Hm</think>")
    if "<tool_call>" in model.model.tokenizer.special_tokens:
        visible = visible.replace("<tool_call>", "")
    num_tokens = len(model.engine.config.reply)
    for max_tokens in range(1, num_tokens + 1):
        fields: dict[str, Any] = {"tools": TOOLS, "max_tokens": max_tokens}
        if stream:
            chunks = ask_stream(model.url, CHAT, **fields)
            message, reason = messages_of(chunks)[0], finish_reasons(chunks)[0][0]
        else:
            (choice,) = ask_json(model.url, CHAT, **fields)["choices"]
            message, reason = choice["message"], choice["finish_reason"]
        assert reason == "length"
        if calls := message.get("tool_calls"):
            assert (message["reasoning"], message["content"]) == ("Hm", "Well. ")
            assert '{"a": 1}'.startswith(calls[0]["function"]["arguments"])
        else:
            reasoning, content = message.get("reasoning", ""), message["content"] or ""
            assert "Hm</think>".startswith(reasoning)
            assert visible.startswith(content) or reply.startswith(content)
    assert calls


def test_control_tokens_can_be_shown(tmp_path: Path) -> None:
    with shared_server(write_tool_model(tmp_path, special_tags=True), vocab_size=263) as server:
        say(server, "<think>a</think>b</tool_call>")
        for shown in (False, True):
            (choice,) = ask_json(server.url, CHAT, tools=TOOLS, skip_special_tokens=not shown)["choices"]
            assert choice["message"]["content"] == ("b</tool_call>" if shown else "b")
            assert choice["message"]["reasoning"] == "a"
