"""Tools and reasoning in all dialects, with tags and in the harmony format, the official clients and a fake engine."""

import json
from typing import Any

import msgspec
import pytest
from anthropic import Anthropic

from server.generation.choice import ToolCallDelta
from server.http.strict_json import MAX_DEPTH
from server.parts.conversions.answers import arguments_of
from tests.server.dialects import ask_events, prompt_of
from tests.server.kinds import Servers
from tests.support import clients
from tests.support.clients import ANTHROPIC, CHAT, MESSAGES, MINIMAL, OLLAMA_CHAT, RESPONSES, ask_json, ask_stream
from tests.support.serving import RunningServer
from tests.support.tool_model import CALL, PARAMETERS, TOOLS, messages_of, prompt, say

NAMED = {"name": "weather", "description": "How it is"}
TOOL: Any = NAMED | {"input_schema": PARAMETERS}
FUNCTION: Any = {"type": "function", "parameters": PARAMETERS} | NAMED
SAID = f"<think>Hm.</think>Let me see.{CALL}{CALL}"
CITY = {"city": "東京"}


@pytest.fixture
def model(plain: RunningServer) -> RunningServer:
    say(plain, SAID)
    return plain


SUNNY = "<|im_start|>tool\nsunny<|im_end|>\n"
RESULTS = f"<think>Hm.</think>Let me see.\n{CALL}\n{CALL}<|im_end|>\n{SUNNY}{SUNNY}<|im_start|>assistant\n"


def test_messages(model: RunningServer) -> None:
    request: dict[str, Any] = MINIMAL[ANTHROPIC] | {"tools": [TOOL], "tool_choice": {"type": "auto"}}
    claude = Anthropic(base_url=model.url, api_key="none", max_retries=0, _strict_response_validation=True)
    message = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    assert message.stop_reason == streamed.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    first, second = (block for block in message.content if block.type == "tool_use")
    assert (first.name, first.input) == (second.name, second.input) == ("weather", CITY)
    assert first.id != second.id
    without_id = [[block.model_dump(exclude={"id"}) for block in each.content] for each in (message, streamed)]
    assert without_id[0] == without_id[1]
    before = prompt_of(model)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in (first, second)]
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    request["messages"] = [*MESSAGES, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    claude.messages.create(**request)
    claude.close()
    assert prompt_of(model) == before + RESULTS


def test_responses(model: RunningServer) -> None:
    request: dict[str, Any] = {"model": "tiny", "tools": [FUNCTION], "tool_choice": "auto"}
    own = {"id", "call_id", "parsed_arguments"}
    with clients.openai_client(model.url) as client:
        response = client.responses.create(input="Hi", **request)
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        assert response.output_text == "Let me see."
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens > 0
        calls = [item for item in response.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", CITY)] * 2
        before = prompt_of(model)
        with client.responses.stream(input="Hi", **request) as stream:
            streamed = stream.get_final_response()
        for one, other in zip(streamed.output[2:], response.output[2:], strict=True):
            assert one.model_dump(exclude=own, exclude_none=True) == other.model_dump(exclude=own, exclude_none=True)
        result: Any = {"type": "function_call_output", "output": "sunny"}
        results = [result | {"call_id": call.call_id} for call in calls]
        for more in (
            {"input": results, "previous_response_id": response.id},
            {"input": [*MESSAGES, *response.output, *results]},
        ):
            client.responses.create(**request, **more)
            assert prompt_of(model) == before + RESULTS


def test_calls_one_after_another(model: RunningServer) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask_json(model.url, ANTHROPIC, tools=[TOOL], tool_choice=choice)
    assert sum(block["type"] == "tool_use" for block in message["content"]) == 1
    response = ask_json(model.url, RESPONSES, tools=[FUNCTION], parallel_tool_calls=False)
    assert sum(item["type"] == "function_call" for item in response["output"]) == 1


def test_reasoning_is_requested(model: RunningServer) -> None:
    for path, fields, opened in (
        (CHAT, {"reasoning_effort": "low"}, True),
        (CHAT, {"reasoning_effort": "none"}, False),
        (CHAT, {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
        (ANTHROPIC, {"thinking": {"type": "enabled", "budget_tokens": 4}}, True),
        (ANTHROPIC, {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, False),
        (ANTHROPIC, {"thinking": {"type": "adaptive", "display": "updates"}}, False),
        (ANTHROPIC, {"thinking": {"type": "between_tools"}}, False),
        (ANTHROPIC, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True),
        (ANTHROPIC, {"output_config": {"effort": "high"}}, False),  # as if there were none
        (ANTHROPIC, {"output_config": {"effort": "max"}}, True),
        (RESPONSES, {"reasoning": {"effort": "low"}}, True),
        (RESPONSES, {"reasoning": {"effort": "none"}}, False),
        (OLLAMA_CHAT, {"think": True}, True),
        (OLLAMA_CHAT, {"think": False}, False),
    ):
        ask_json(model.url, path, **fields)
        assert prompt_of(model).endswith("<think>\n") == opened


def test_budgets_and_omitted_reasoning(tools: RunningServer) -> None:
    say(tools, "<think>Hm.</think>Yes")
    for kind, num_tokens in (("enabled", 99), ("adaptive", None)):
        thinking = {"type": kind, "budget_tokens": 99, "display": "omitted"}
        message = ask_json(tools.url, ANTHROPIC, thinking=thinking, max_tokens=-1)  # which no budget exceeds
        assert [block["type"] for block in message["content"]] == ["text"]
        budget = tools.engine.submits[-1].params.reasoning_limit
        assert (budget and (budget.max_tokens, budget.is_open)) == (num_tokens and (num_tokens, True))


# The harmony format.

NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me see.<|end|>{NEXT}"
HARMONY_CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "東京"}'
FINAL = "<|channel|>final<|message|>"


@pytest.fixture(params=["harmony_plain", "harmony_tools"])
def harmony(of_kind: Servers, request: pytest.FixtureRequest) -> RunningServer:
    """With markers as plain text and as control tokens, for tests of what depends on it."""
    return of_kind(request.param)


def test_chat_in_harmony(harmony: RunningServer) -> None:
    say(harmony, ANALYSIS + PREAMBLE + HARMONY_CALL)
    (choice,) = ask_json(harmony.url, CHAT, tools=TOOLS)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    for message in (choice["message"], messages_of(ask_stream(harmony.url, CHAT, tools=TOOLS))[0]):
        assert (message["reasoning"], message["content"]) == ("Hm.", "Let me see.")
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", CITY)
    say(harmony, f"{ANALYSIS}{FINAL}Yes")
    (choice,) = ask_json(harmony.url, CHAT)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "Yes")
    num_tokens = len(harmony.model.tokenizer.encode("<|channel|>analysis<|mess"))
    (choice,) = ask_json(harmony.url, CHAT, max_tokens=num_tokens)["choices"]
    assert not choice["message"]["content"]  # no part of a header


def test_the_final_message_is_continued(harmony_tools: RunningServer) -> None:
    say(harmony_tools, " see")
    chat = [*MESSAGES, {"role": "assistant", "content": "I", "reasoning": "Hm."}]
    body = {"messages": chat, "continue_final_message": True}
    assert prompt(harmony_tools, **body).endswith(f"<|end|>{NEXT}{ANALYSIS}{FINAL}I")
    assert ask_json(harmony_tools.url, CHAT, **body)["choices"][0]["message"]["content"] == " see"


def test_responses_in_harmony(harmony_tools: RunningServer) -> None:
    say(harmony_tools, ANALYSIS + PREAMBLE + HARMONY_CALL)
    fields: dict[str, Any] = {"tools": [FUNCTION], "reasoning": {"effort": "low"}}
    streamed = ask_events(harmony_tools.url, RESPONSES, **fields)[-1]["response"]
    for response in (ask_json(harmony_tools.url, RESPONSES, **fields), streamed):
        reasoning, message, call = response["output"]
        assert (reasoning["type"], message["content"][0]["text"]) == ("reasoning", "Let me see.")
        assert (call["type"], json.loads(call["arguments"])) == ("function_call", CITY)
    assert "\nReasoning: low\n" in prompt_of(harmony_tools)


def test_log_probabilities_are_those_of_the_content(harmony_tools: RunningServer) -> None:
    say(harmony_tools, f"{ANALYSIS}{PREAMBLE}{ANALYSIS}{FINAL}Yes")
    output = ask_json(harmony_tools.url, RESPONSES, include=["message.output_text.logprobs"])["output"]
    contents = [item["content"][0] for item in output if item["type"] == "message"]
    assert [content["text"] for content in contents] == ["Let me see.", "\n\nYes"]
    tokens = ["".join(each["token"] for each in content["logprobs"]) for content in contents]
    assert tokens == ["Let me see.", "Yes<|endoftext|>"]


def test_messages_in_harmony(harmony_tools: RunningServer) -> None:
    say(harmony_tools, ANALYSIS + PREAMBLE + HARMONY_CALL)
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 999}}  # the model has no budget
    for fields, effort in (({"output_config": {"effort": "low"}}, "low"), (thinking, "medium")):
        message = ask_json(harmony_tools.url, ANTHROPIC, tools=[TOOL], **fields)
        assert f"\nReasoning: {effort}\n" in prompt_of(harmony_tools)
        assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
        assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("depth", [1, 98, 99, 995, 100_000])
def test_arguments_that_are_nested_too_deep_are_text(depth: int) -> None:
    text = '{"a": ' + "[" * depth + "]" * depth + "}"
    arguments = arguments_of(ToolCallDelta(0, "id", "name", text))
    assert msgspec.json.encode(arguments)
    assert (arguments == {"arguments": text}) == (depth >= MAX_DEPTH)
