"""Tests of `/v1/responses` with the official Python client and its strict response validation."""

from collections.abc import Iterator
from typing import Annotated, Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess
from tests.support.serving import wait_until

OPTIONS: dict[str, Any] = {
    "api_key": "none",
    "max_retries": 0,
    "timeout": REQUEST_SECONDS,
    "_strict_response_validation": True,
}
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "instructions": "You answer in one short sentence.",
    "input": "What is the capital of France? 🗼",
    "max_output_tokens": 6,
    "temperature": 0.8,
    "extra_body": {"seed": 4},
}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", **OPTIONS) as client:
        yield client


def test_a_response(client: OpenAI, server: ServerProcess) -> None:
    """The text is that of chat completions."""
    response = client.responses.create(**REQUEST)
    messages = [{"role": "system", "content": REQUEST["instructions"]}, {"role": "user", "content": REQUEST["input"]}]
    chat = server.answer("/v1/chat/completions", {"messages": messages, "max_tokens": 6, "temperature": 0.8, "seed": 4})
    assert response.output_text == chat["choices"][0]["message"]["content"] != ""
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat["usage"]["prompt_tokens"], 6)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_stream(client: OpenAI) -> None:
    logprobs: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with client.responses.stream(**REQUEST, **logprobs) as stream:
        events = list(stream)
    whole = client.responses.create(**REQUEST, **logprobs)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.incomplete"
    assert text == last.response.output_text == whole.output_text
    message, other = last.response.output[0], whole.output[0]
    assert message.type == other.type == "message"
    assert message.content == other.content
    assert message.content[0].type == "output_text"
    assert len(message.content[0].logprobs or ()) == 6


def test_a_conversation(client: OpenAI) -> None:
    first = client.responses.create(**REQUEST)
    second = client.responses.create(**(REQUEST | {"input": "And of Italy?"}), previous_response_id=first.id)
    turns = [{"role": "user", "content": REQUEST["input"]}, {"role": "assistant", "content": first.output_text}]
    again: dict[str, Any] = REQUEST | {"input": [*turns, {"role": "user", "content": "And of Italy?"}]}
    assert client.responses.create(**again).output_text == second.output_text
    (item,) = client.responses.input_items.list(second.id)
    assert item.type == "message"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**REQUEST, previous_response_id=first.id)
    assert error.value.code == "previous_response_not_found"


def test_in_the_background(client: OpenAI) -> None:
    endless: dict[str, Any] = REQUEST | {"max_output_tokens": 3000, "extra_body": {"ignore_eos": True}}
    cancelled = client.responses.create(**endless, background=True)
    response = client.responses.create(**REQUEST, background=True)
    assert response.status == cancelled.status == "in_progress"
    assert client.responses.cancel(cancelled.id).status == "cancelled"
    wait_until(lambda: client.responses.retrieve(response.id).status == "incomplete", REQUEST_SECONDS)
    assert client.responses.retrieve(response.id).output_text == client.responses.create(**REQUEST).output_text
    assert client.responses.retrieve(cancelled.id).status == "cancelled"


def test_a_stream_in_the_background(client: OpenAI) -> None:
    """A client that disconnects and resumes gets every event."""
    stream = client.responses.create(**REQUEST, background=True, stream=True)
    first = [next(stream) for _ in range(5)]
    stream.close()
    assert first[0].type == "response.created"
    response_id = first[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=4))
    text = "".join(event.delta for event in [*first, *rest] if event.type == "response.output_text.delta")
    last = rest[-1]
    assert last.type == "response.incomplete"
    assert text == last.response.output_text == client.responses.create(**REQUEST).output_text
    assert [event.sequence_number for event in [*first, *rest]] == list(range(len(first) + len(rest)))
    assert list(client.responses.retrieve(response_id, stream=True)) == [*first, *rest]
    counted = client.responses.input_tokens.count(
        model=MODEL, instructions=REQUEST["instructions"], input=REQUEST["input"]
    )
    assert last.response.usage is not None
    assert counted.input_tokens == last.response.usage.input_tokens


@pytest.mark.anyio
async def test_the_asynchronous_client(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", **OPTIONS) as client:
        stream = await client.responses.create(**REQUEST, stream=True)
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.incomplete"
        assert (await client.responses.retrieve(events[-1].response.id)).output == events[-1].response.output


class Weather(BaseModel):
    city: Annotated[str, Field(max_length=20)]
    is_hot: bool


def test_a_response_with_a_schema(client: OpenAI) -> None:
    response = client.responses.parse(
        model=MODEL, input="Paris is hot.", text_format=Weather, temperature=0, max_output_tokens=100
    )
    assert isinstance(response.output_parsed, Weather)


def test_a_required_tool_call(client: OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(Weather, name="report")
    function: Any = {"type": "function", **tool["function"]}
    request: dict[str, Any] = {"model": MODEL, "tools": [function], "temperature": 0, "max_output_tokens": 100}
    response = client.responses.create(input="How is Paris?", tool_choice="required", **request)
    with client.responses.stream(input="How is Paris?", tool_choice="required", **request) as stream:
        streamed = stream.get_final_response()
    (call,), (other,) = response.output, streamed.output
    assert call.type == other.type == "function_call"
    assert call.arguments == other.arguments
    assert Weather.model_validate_json(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Noted."}
    last = client.responses.create(input=[result], previous_response_id=response.id, tool_choice="none", **request)
    assert last.output_text
