"""Chats with a model in the harmony format, in all dialects, with a fake engine."""

import json
from typing import Any

import pytest

from tests.server.api.conftest import Servers
from tests.server.api.contract import ANTHROPIC, RESPONSES
from tests.server.api.dialects import ask_events, prompt_of, text_of
from tests.server.api.dialects import ask_json as ask_dialect
from tests.support.clients import CHAT, MESSAGES, ask_json, ask_stream
from tests.support.serving import RunningServer
from tests.support.tool_model import PARAMETERS, TOOLS, messages_of, prompt, say

NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me see.<|end|>{NEXT}"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "東京"}'
FINAL = "<|channel|>final<|message|>"
CITY = {"city": "東京"}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}


@pytest.fixture
def special(of_kind: Servers) -> RunningServer:
    """With markers as control tokens."""
    return of_kind("harmony_tools")


@pytest.fixture(params=["harmony_plain", "harmony_tools"])
def model(of_kind: Servers, request: pytest.FixtureRequest) -> RunningServer:
    """With markers as plain text and as control tokens, for tests of what depends on it."""
    return of_kind(request.param)


def test_chat(model: RunningServer) -> None:
    say(model, ANALYSIS + PREAMBLE + CALL)
    (choice,) = ask_json(model.url, CHAT, tools=TOOLS)["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["reasoning"], message["content"]) == ("tool_calls", "Hm.", "Let me see.")
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", CITY)
    streamed = messages_of(ask_stream(model.url, CHAT, tools=TOOLS))[0]
    assert (streamed["reasoning"], streamed["content"]) == ("Hm.", "Let me see.")
    assert [each["function"] for each in streamed["tool_calls"]] == [call["function"]]
    say(model, f"{ANALYSIS}{FINAL}Yes")
    (choice,) = ask_json(model.url, CHAT)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "Yes")
    num_tokens = len(model.model.tokenizer.encode("<|channel|>analysis<|mess"))
    (choice,) = ask_json(model.url, CHAT, max_tokens=num_tokens)["choices"]
    assert not choice["message"]["content"]  # no part of a header


def test_the_conversation_is_sent_back(special: RunningServer) -> None:
    say(special, ANALYSIS + CALL)
    first = prompt(special, tools=TOOLS, reasoning_effort="high")
    assert "\nReasoning: high\n" in first
    assert "type time = () => any;" in first
    message = ask_json(special.url, CHAT, tools=TOOLS)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny<|end|>"}
    chat = [*MESSAGES, message, result]
    text = prompt(special, messages=chat, tools=TOOLS)
    called = f'{ANALYSIS} to=functions.weather<|channel|>commentary json<|message|>{{"city": "東京"}}<|call|>'
    given = '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny<|end|>"<|end|>'
    assert text.endswith(f"<|start|>user<|message|>Hi<|end|>{NEXT}{called}{given}{NEXT}")
    chat += [{"role": "assistant", "content": "Sunny.", "reasoning": "So."}, *MESSAGES]
    assert "Hm." not in prompt(special, messages=chat)


def test_the_final_message_is_continued(special: RunningServer) -> None:
    say(special, " see")
    chat = [*MESSAGES, {"role": "assistant", "content": "I", "reasoning": "Hm."}]
    body = {"messages": chat, "continue_final_message": True}
    assert prompt(special, **body).endswith(f"<|end|>{NEXT}{ANALYSIS}{FINAL}I")
    assert ask_json(special.url, CHAT, **body)["choices"][0]["message"]["content"] == " see"


def test_responses(special: RunningServer) -> None:
    say(special, ANALYSIS + PREAMBLE + CALL)
    function = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    fields: dict[str, Any] = {"tools": [function], "reasoning": {"effort": "low"}}
    response = ask_dialect(special, RESPONSES, **fields)
    reasoning, message, call = response["output"]
    assert (reasoning["type"], message["content"][0]["text"]) == ("reasoning", "Let me see.")
    assert (call["type"], json.loads(call["arguments"])) == ("function_call", CITY)
    streamed = ask_events(special, RESPONSES, **fields)[-1]["response"]["output"]
    assert [item["type"] for item in streamed] == ["reasoning", "message", "function_call"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}]
    say(special, f"{FINAL}Sunny.")
    answer = ask_dialect(special, RESPONSES, input=results, previous_response_id=response["id"], **fields)
    assert text_of(answer) == "Sunny."
    assert prompt_of(special).endswith(
        f"{NEXT}<|channel|>analysis<|message|>Hm.\n\nLet me see.<|end|>"
        f'{NEXT} to=functions.weather<|channel|>commentary json<|message|>{{"city": "東京"}}<|call|>'
        f'<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|>{NEXT}'
    )
    assert "\nReasoning: low\n" in prompt_of(special)


def test_log_probabilities_are_those_of_the_content(special: RunningServer) -> None:
    say(special, f"{ANALYSIS}{PREAMBLE}{ANALYSIS}{FINAL}Yes")
    output = ask_dialect(special, RESPONSES, include=["message.output_text.logprobs"])["output"]
    contents = [item["content"][0] for item in output if item["type"] == "message"]
    assert [content["text"] for content in contents] == ["Let me see.", "\n\nYes"]
    tokens = ["".join(each["token"] for each in content["logprobs"]) for content in contents]
    assert tokens == ["Let me see.", "Yes<|endoftext|>"]


def test_messages(special: RunningServer) -> None:
    say(special, ANALYSIS + PREAMBLE + CALL)
    # The model has no budget.
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1100}
    for fields in ({}, thinking):
        message = ask_dialect(special, ANTHROPIC, tools=[{"name": "weather", "input_schema": PARAMETERS}], **fields)
        assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
        assert message["stop_reason"] == "tool_use"
