"""Tools and reasoning in all dialects, with tags and in the harmony format, the official clients and a fake engine."""

import json
from typing import Any

import pytest

from tests.server.api.conftest import Servers, anthropic_client
from tests.server.api.dialects import ask_events, prompt_of, text_of
from tests.support.clients import ANTHROPIC, CHAT, MESSAGES, MINIMAL, RESPONSES, ask_json, ask_stream, openai_client
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


RESULTS = (
    f"<think>Hm.</think>Let me see.\n{CALL}\n{CALL}<|im_end|>\n"
    + "<|im_start|>tool\nsunny<|im_end|>\n" * 2
    + "<|im_start|>assistant\n"
)


def test_messages(model: RunningServer) -> None:
    request: dict[str, Any] = MINIMAL[ANTHROPIC] | {"tools": [TOOL], "tool_choice": {"type": "auto"}}
    claude = anthropic_client(model)
    message = claude.messages.create(**request)
    assert (message.stop_reason, [block.type for block in message.content]) == (
        "tool_use",
        ["thinking", "text", "tool_use", "tool_use"],
    )
    first, second = (block for block in message.content if block.type == "tool_use")
    assert (first.name, first.input) == (second.name, second.input) == ("weather", CITY)
    assert first.id != second.id
    with claude.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    without_id = [block.model_dump(exclude={"id"}) for block in streamed.content]
    assert without_id == [block.model_dump(exclude={"id"}) for block in message.content]
    assert streamed.stop_reason == "tool_use"
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
    with openai_client(model.url) as client:
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
    ):
        ask_json(model.url, path, **fields)
        assert prompt_of(model).endswith("<think>\n") == opened


def test_budgets_and_omitted_reasoning(tools: RunningServer) -> None:
    say(tools, "<think>Hm.</think>Yes")
    for kind, num_tokens in (("enabled", 99), ("adaptive", None)):
        thinking = {"type": kind, "budget_tokens": 99, "display": "omitted"}
        assert [block["type"] for block in ask_json(tools.url, ANTHROPIC, thinking=thinking)["content"]] == ["text"]
        budget = tools.engine.submits[-1].params.reasoning_limit
        assert (budget and budget.max_tokens) == num_tokens


# The harmony format.

NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me see.<|end|>{NEXT}"
HARMONY_CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "東京"}'
FINAL = "<|channel|>final<|message|>"


@pytest.fixture
def special(of_kind: Servers) -> RunningServer:
    """With markers as control tokens."""
    return of_kind("harmony_tools")


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


def test_the_final_message_is_continued(special: RunningServer) -> None:
    say(special, " see")
    chat = [*MESSAGES, {"role": "assistant", "content": "I", "reasoning": "Hm."}]
    body = {"messages": chat, "continue_final_message": True}
    assert prompt(special, **body).endswith(f"<|end|>{NEXT}{ANALYSIS}{FINAL}I")
    assert ask_json(special.url, CHAT, **body)["choices"][0]["message"]["content"] == " see"


def test_responses_in_harmony(special: RunningServer) -> None:
    say(special, ANALYSIS + PREAMBLE + HARMONY_CALL)
    fields: dict[str, Any] = {"tools": [FUNCTION], "reasoning": {"effort": "low"}}
    response = ask_json(special.url, RESPONSES, **fields)
    for output in (response["output"], ask_events(special.url, RESPONSES, **fields)[-1]["response"]["output"]):
        reasoning, message, call = output
        assert (reasoning["type"], message["content"][0]["text"]) == ("reasoning", "Let me see.")
        assert (call["type"], json.loads(call["arguments"])) == ("function_call", CITY)
    results = [{"type": "function_call_output", "call_id": response["output"][-1]["call_id"], "output": "sunny<|end|>"}]
    say(special, f"{FINAL}Sunny.")
    answer = ask_json(special.url, RESPONSES, input=results, previous_response_id=response["id"], **fields)
    assert text_of(answer) == "Sunny."
    assert prompt_of(special).endswith(
        f"{NEXT}<|channel|>analysis<|message|>Hm.\n\nLet me see.<|end|>"
        f'{NEXT} to=functions.weather<|channel|>commentary json<|message|>{{"city": "東京"}}<|call|>'
        f'<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny<|end|>"<|end|>{NEXT}'
    )
    assert "\nReasoning: low\n" in prompt_of(special)


def test_log_probabilities_are_those_of_the_content(special: RunningServer) -> None:
    say(special, f"{ANALYSIS}{PREAMBLE}{ANALYSIS}{FINAL}Yes")
    output = ask_json(special.url, RESPONSES, include=["message.output_text.logprobs"])["output"]
    contents = [item["content"][0] for item in output if item["type"] == "message"]
    assert [content["text"] for content in contents] == ["Let me see.", "\n\nYes"]
    tokens = ["".join(each["token"] for each in content["logprobs"]) for content in contents]
    assert tokens == ["Let me see.", "Yes<|endoftext|>"]


def test_messages_in_harmony(special: RunningServer) -> None:
    say(special, ANALYSIS + PREAMBLE + HARMONY_CALL)
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 999}}  # the model has no budget
    for fields, effort in (({"output_config": {"effort": "low"}}, "low"), (thinking, "medium")):
        message = ask_json(special.url, ANTHROPIC, tools=[TOOL], **fields)
        assert f"\nReasoning: {effort}\n" in prompt_of(special)
        assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
        assert message["stop_reason"] == "tool_use"
