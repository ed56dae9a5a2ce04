"""Tests with Anthropic's official Python client and its strict response validation."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import ToolUseBlock

from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess

OPTIONS: dict[str, Any] = {
    "api_key": "none",
    "max_retries": 0,
    "timeout": REQUEST_SECONDS,
    "_strict_response_validation": True,
}
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "system": [{"type": "text", "text": "You answer in one short sentence.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello. What can I do?"}]},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France? 🗼"}]},
    ],
    "max_tokens": 6,
    "extra_body": {"temperature": 0.8, "seed": 4},
}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, **OPTIONS) as client:
        yield client


def test_messages(client: Anthropic) -> None:
    message = client.messages.create(**REQUEST)
    with client.messages.stream(**REQUEST) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert (message.type, message.role, message.model, message._request_id is not None) == (
        "message",
        "assistant",
        MODEL,
        True,
    )
    assert message.stop_reason == streamed.stop_reason == "max_tokens"
    assert [block.model_dump() for block in message.content] == [block.model_dump() for block in streamed.content]
    (block,) = message.content
    assert block.type == "text"
    assert block.text == text != ""
    counted = client.messages.count_tokens(**{name: REQUEST[name] for name in ("model", "system", "messages")})
    for usage in (message.usage, streamed.usage):
        assert usage.output_tokens == 6
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens > 30


def test_the_text_is_that_of_chat_completions(client: Anthropic, server: ServerProcess) -> None:
    messages = [{"role": "system", "content": REQUEST["system"][0]["text"]}, *REQUEST["messages"]]
    fields = {"max_completion_tokens": 6, "temperature": 0.8, "seed": 4}
    chat = server.answer("/v1/chat/completions", {"messages": messages, **fields})
    (block,) = client.messages.create(**REQUEST).content
    assert block.type == "text"
    assert block.text == chat["choices"][0]["message"]["content"]


@pytest.mark.anyio
async def test_events_of_the_asynchronous_client(server: ServerProcess) -> None:
    async with AsyncAnthropic(base_url=server.url, **OPTIONS) as client:
        stop: dict[str, Any] = {"max_tokens": 40, "stop_sequences": ["is", "the", "a"]}
        stream = await client.messages.create(**(REQUEST | stop), stream=True)
        events = [event async for event in stream]
    kinds = list(dict.fromkeys(event.type for event in events))
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, "message_delta", "message_stop"]
    end = events[-2]
    assert end.type == "message_delta"
    assert (end.delta.stop_reason, end.delta.stop_sequence in stop["stop_sequences"]) == ("stop_sequence", True)


def test_models(client: Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_input_tokens == 4096


def test_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as not_found:
        client.messages.create(**(REQUEST | {"model": "other"}))
    assert not_found.value.request_id
    assert isinstance(not_found.value.body, dict)
    assert not_found.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 4096 maximum"):
        client.messages.create(**(REQUEST | {"system": "word " * 5000}))


CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}


def test_a_required_tool_call(client: Anthropic) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"name": "weather", "description": "The weather of a city", "input_schema": CITY}],
        "tool_choice": {"type": "any"},
        "max_tokens": 100,
        "extra_body": {"temperature": 0},
    }
    message = client.messages.create(**request)
    with client.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    for answer in (message, streamed):
        (block,) = answer.content
        assert isinstance(block, ToolUseBlock)
        assert (block.name, list(block.input), answer.stop_reason) == ("weather", ["city"], "tool_use")
    call: Any = message.content[0]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 25 degrees."}
    turns = [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    request |= {"messages": [*request["messages"], *turns], "tool_choice": {"type": "none"}}
    (reply,) = client.messages.create(**request).content
    assert reply.type == "text"
    assert reply.text


def test_a_response_with_a_schema(client: Anthropic) -> None:
    fields: dict[str, Any] = {"output_config": {"format": {"type": "json_schema", "schema": CITY}}, "max_tokens": 100}
    (block,) = client.messages.create(**(REQUEST | fields)).content
    assert block.type == "text"
    assert isinstance(json.loads(block.text)["city"], str)
