"""Tests of tool calls with the official client and a real model, which may choose bad but never malformed calls."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.test_openai_client import STRICT
from tests.support.server_process import MODEL, ServerProcess

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Now", "parameters": PARAMETERS}}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [WEATHER],
    "max_completion_tokens": 24,
    "temperature": 0,
}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", **STRICT) as client:
        yield client


def content_and_calls(message: Any) -> tuple[str, list[tuple[str, str]]]:
    """Return the content and the calls (name, arguments)."""
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", calls


def test_a_stream_adds_up_to_the_response(client: OpenAI) -> None:
    fields = CHAT | {"stop": [".", "?", "}"], "max_completion_tokens": 200}  # the helper rejects truncated responses
    answer = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion()
    for one, other in zip(answer.choices, streamed.choices, strict=True):
        assert content_and_calls(one.message) == content_and_calls(other.message) != ("", [])
        assert one.finish_reason == other.finish_reason


def test_tools_are_part_of_the_prompt(client: OpenAI) -> None:
    def num_prompt_tokens(**fields: Any) -> int:
        usage = client.chat.completions.create(**(CHAT | fields)).usage
        assert usage is not None
        num_tokens: int = usage.prompt_tokens
        return num_tokens

    without = num_prompt_tokens(tools=openai.omit)
    assert num_prompt_tokens() > without + 50
    assert num_prompt_tokens(tool_choice="none") == without


def test_a_conversation_with_calls(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    history = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'},
    ]
    answer = client.chat.completions.create(**(CHAT | {"messages": history}))
    assert content_and_calls(answer.choices[0].message) != ("", [])


def test_a_required_call(client: OpenAI) -> None:
    """A call is forced even at a high temperature."""
    city = {"type": "string", "maxLength": 12}
    parameters = PARAMETERS | {"properties": {"city": city}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    named = {"type": "function", "function": {"name": "get_weather"}}
    fixed = {"tools": [tool], "temperature": 1.5, "seed": 3, "max_completion_tokens": 60, "parallel_tool_calls": False}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        (answer,) = client.chat.completions.create(**(CHAT | fixed | {"tool_choice": choice})).choices
        content, ((name, arguments),) = content_and_calls(answer.message)
        assert (content, name, answer.finish_reason) == ("", "get_weather", reason)
        assert len(json.loads(arguments)["city"]) <= 12


def test_errors_name_the_field(client: OpenAI) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": openai.omit, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": []}}, "chat_template_kwargs"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**(CHAT | fields))
        assert caught.value.param == param
