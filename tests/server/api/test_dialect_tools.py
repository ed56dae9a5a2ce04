"""Tools and reasoning in `/v1/messages` and `/v1/responses`, with the official clients and a fake engine."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.server.api.conftest import anthropic_client
from tests.server.api.dialects import prompt_of
from tests.support.clients import openai_client
from tests.support.serving import RunningServer
from tests.support.tool_model import CALL, PARAMETERS, say

NAMED = {"name": "weather", "description": "How it is"}
TOOL: Any = NAMED | {"input_schema": PARAMETERS}
FUNCTION: Any = {"type": "function", "parameters": PARAMETERS} | NAMED
SAID = f"<think>Hm.</think>Let me see.{CALL}{CALL}"
CITY = {"city": "東京"}


@pytest.fixture
def model(plain: RunningServer) -> RunningServer:
    say(plain, SAID)
    return plain


@pytest.fixture
def claude(model: RunningServer) -> Iterator[Anthropic]:
    with anthropic_client(model) as client:
        yield client


@pytest.fixture
def client(model: RunningServer) -> Iterator[OpenAI]:
    with openai_client(model.url) as client:
        yield client


RESULTS = (
    f"<think>Hm.</think>Let me see.\n{CALL}\n{CALL}<|im_end|>\n"
    + "<|im_start|>tool\nsunny<|im_end|>\n" * 2
    + "<|im_start|>assistant\n"
)


def test_messages(model: RunningServer, claude: Anthropic) -> None:
    request: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "tools": [TOOL], "tool_choice": {"type": "auto"}}
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    message = claude.messages.create(messages=messages, **request)
    assert (message.stop_reason, [block.type for block in message.content]) == (
        "tool_use",
        ["thinking", "text", "tool_use", "tool_use"],
    )
    first, second = (block for block in message.content if block.type == "tool_use")
    assert (first.name, first.input) == (second.name, second.input) == ("weather", CITY)
    assert first.id != second.id
    with claude.messages.stream(messages=messages, **request) as stream:
        streamed = stream.get_final_message()
    without_id = [block.model_dump(exclude={"id"}) for block in streamed.content]
    assert without_id == [block.model_dump(exclude={"id"}) for block in message.content]
    assert streamed.stop_reason == "tool_use"
    before = prompt_of(model)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in (first, second)]
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    messages += [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    claude.messages.create(messages=messages, **request)
    assert prompt_of(model) == before + RESULTS


def test_responses(model: RunningServer, client: OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "tools": [FUNCTION], "tool_choice": "auto"}
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
    own = {"id", "call_id", "parsed_arguments"}
    assert [item.model_dump(exclude=own, exclude_none=True) for item in streamed.output][2:] == [
        item.model_dump(exclude=own, exclude_none=True) for item in response.output
    ][2:]
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls
    ]
    client.responses.create(input=results, previous_response_id=response.id, **request)
    assert prompt_of(model) == before + RESULTS
    items: list[Any] = [{"role": "user", "content": "Hi"}, *response.output, *results]
    client.responses.create(input=items, **request)
    assert prompt_of(model) == before + RESULTS


def test_calls_one_after_another(model: RunningServer, claude: Anthropic, client: OpenAI) -> None:
    message = claude.messages.create(
        model="tiny",
        max_tokens=500,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[TOOL],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )
    assert sum(block.type == "tool_use" for block in message.content) == 1
    response = client.responses.create(model="tiny", input="Hi", tools=[FUNCTION], parallel_tool_calls=False)
    assert sum(item.type == "function_call" for item in response.output) == 1


def test_reasoning_is_requested(model: RunningServer) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
    for thinking, opened in (({"type": "enabled", "budget_tokens": 4}, True), ({"type": "disabled"}, False)):
        httpx.post(f"{model.url}/v1/messages", json=body | {"thinking": thinking}).raise_for_status()
        assert prompt_of(model).endswith("<think>\n") == opened
    for effort, opened in (("low", True), ("none", False)):
        requested = {"model": "tiny", "input": "Hi", "max_output_tokens": 5, "reasoning": {"effort": effort}}
        httpx.post(f"{model.url}/v1/responses", json=requested).raise_for_status()
        assert prompt_of(model).endswith("<think>\n") == opened
