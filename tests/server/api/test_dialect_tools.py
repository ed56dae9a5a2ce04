"""Tools and reasoning in `/v1/messages` and `/v1/responses`, with the official clients and a fake engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.support.clients import openai_client, shared_server
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import say, write_tool_model

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NAMED = {"name": "weather", "description": "How it is"}
TOOL: Any = NAMED | {"input_schema": PARAMETERS}
FUNCTION: Any = {"type": "function", "parameters": PARAMETERS} | NAMED
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
SAID = f"<think>Hm.</think>Let me see.{CALL}{CALL}"
CITY = {"city": "東京"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with shared_server(write_tool_model(Path(tmp_path_factory.mktemp("tools")), special_tags=False)) as server:
        say(server, SAID)
        yield server


@pytest.fixture
def anthropic_client(model: RunningServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=model.url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
def client(model: RunningServer) -> Iterator[OpenAI]:
    with openai_client(model.url) as client:
        yield client


def prompt(model: RunningServer) -> str:
    return model.model.tokenizer.decode(model.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)


def test_messages(model: RunningServer, anthropic_client: Anthropic) -> None:
    request: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "tools": [TOOL], "tool_choice": {"type": "auto"}}
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    message = anthropic_client.messages.create(messages=messages, **request)
    assert (message.stop_reason, [block.type for block in message.content]) == (
        "tool_use",
        ["thinking", "text", "tool_use", "tool_use"],
    )
    first, second = (block for block in message.content if block.type == "tool_use")
    assert (first.name, first.input) == (second.name, second.input) == ("weather", CITY)
    assert first.id != second.id
    with anthropic_client.messages.stream(messages=messages, **request) as stream:
        streamed = stream.get_final_message()
    without_id = [block.model_dump(exclude={"id"}) for block in streamed.content]
    assert without_id == [block.model_dump(exclude={"id"}) for block in message.content]
    assert streamed.stop_reason == "tool_use"
    before = prompt(model)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in (first, second)]
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    messages += [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    anthropic_client.messages.create(messages=messages, **request)
    call = f"\n{CALL}"
    assert prompt(model) == (
        f"{before}<think>Hm.</think>Let me see.{call}{call}<|im_end|>\n"
        + "<|im_start|>tool\nsunny<|im_end|>\n" * 2
        + "<|im_start|>assistant\n"
    )


def test_responses(model: RunningServer, client: OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "tools": [FUNCTION], "tool_choice": "auto"}
    response = client.responses.create(input="Hi", **request)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "Let me see."
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    calls = [item for item in response.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", CITY)] * 2
    before = prompt(model)
    with client.responses.stream(input="Hi", **request) as stream:
        streamed = stream.get_final_response()
    own = {"id", "call_id", "parsed_arguments"}
    assert [item.model_dump(exclude=own, exclude_none=True) for item in streamed.output][2:] == [
        item.model_dump(exclude=own, exclude_none=True) for item in response.output
    ][2:]
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls
    ]
    call = f"\n{CALL}"
    expected = (
        f"{before}<think>Hm.</think>Let me see.{call}{call}<|im_end|>\n"
        + "<|im_start|>tool\nsunny<|im_end|>\n" * 2
        + "<|im_start|>assistant\n"
    )
    client.responses.create(input=results, previous_response_id=response.id, **request)
    assert prompt(model) == expected
    items: list[Any] = [{"role": "user", "content": "Hi"}, *response.output, *results]
    client.responses.create(input=items, **request)
    assert prompt(model) == expected


def test_calls_one_after_another(model: RunningServer, anthropic_client: Anthropic, client: OpenAI) -> None:
    message = anthropic_client.messages.create(
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
        assert prompt(model).endswith("<think>\n") == opened
    for effort, opened in (("low", True), ("none", False)):
        requested = {"model": "tiny", "input": "Hi", "max_output_tokens": 5, "reasoning": {"effort": effort}}
        httpx.post(f"{model.url}/v1/responses", json=requested).raise_for_status()
        assert prompt(model).endswith("<think>\n") == opened


@pytest.mark.checklist("C23")
def test_invalid_tools(model: RunningServer) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": "Hi"}
    fields: dict[str, Any]
    for fields, param in (
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tools": [FUNCTION | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [FUNCTION | {"parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}}, "text.format.schema"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "time"}}, "tool_choice"),
    ):
        assert check_error(httpx.post(f"{model.url}/v1/responses", json=body | fields), 400)["param"] == param
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
    schema = {"type": "json_schema", "schema": {"type": "x"}}
    for fields, message in (
        ({"tools": [TOOL, TOOL]}, "Invalid 'tools': the name 'weather'"),
        ({"tools": [TOOL | {"name": "a b"}]}, "Invalid 'tools[0].name'"),
        ({"tools": [TOOL | {"input_schema": {"type": "string"}}]}, "Invalid 'tools[0].input_schema'"),
        ({"output_format": schema}, "Invalid 'output_format.schema'"),
        (
            {"output_format": schema, "output_config": {"format": schema}},
            "Invalid 'output_format': it is an alias of 'output_config.format'",
        ),
        ({"output_config": {"format": schema}}, "Invalid 'output_config.format.schema'"),
        ({"tool_choice": {"type": "any"}}, "Invalid 'tool_choice'"),
    ):
        response = httpx.post(f"{model.url}/v1/messages", json=body | fields)
        assert (response.status_code, response.json()["error"]["message"][: len(message)]) == (400, message)
