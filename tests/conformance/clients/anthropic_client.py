"""Anthropic's official client, strict about every answer."""

from typing import Any, Literal

import anthropic
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from tests.conformance.clients.harness import CITIES, PARAMETERS, QUESTION, Server, exercises, refused

SHORT: dict[str, Any] = {
    "system": "You tell stories.",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 8,
    "extra_body": {"temperature": 0.8, "seed": 4},
}
TOOLS = {"tools": [{"name": "get_weather", "input_schema": PARAMETERS}], "max_tokens": 60}


class Animal(BaseModel):
    """An animal, without limits on lengths and numbers: the client drops these from the schema it sends."""

    kind: Literal["cat", "hen"]
    legs: Literal[2, 4]
    is_tame: bool


def options(server: Server) -> dict[str, Any]:
    return server.options | {"base_url": server.url, "_strict_response_validation": True}


@exercises("messages", "streaming", "usage")
def answer_and_stream(server: Server) -> None:
    client = Anthropic(**options(server))
    fields = SHORT | {"model": server.model}
    message = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    (block,) = message.content
    assert block.type == "text"
    assert block.text == text != ""
    assert message.usage.output_tokens == streamed.usage.output_tokens == 8


@exercises("messages", "async", "streaming")
async def asynchronous(server: Server) -> None:
    async with AsyncAnthropic(**options(server)) as client:
        stream = await client.messages.create(**(SHORT | {"model": server.model}), stream=True)
        kinds = [event.type async for event in stream]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


@exercises("messages", "tools", "streaming")
def tools(server: Server) -> None:
    client = Anthropic(**options(server))
    fields: dict[str, Any] = SHORT | TOOLS | {"model": server.model}
    for tool_choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        forced = fields | {"tool_choice": tool_choice | {"disable_parallel_tool_use": True}}
        message = client.messages.create(**forced)
        with client.messages.stream(**forced) as stream:
            (streamed,) = stream.get_final_message().content
        (call,) = message.content
        assert call.type == streamed.type == "tool_use"
        assert call.input == streamed.input
        assert call.input["city"] in CITIES
        assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
    turns = {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}
    history = [*SHORT["messages"], *turns]
    answered = client.messages.create(**(fields | {"messages": history, "tool_choice": {"type": "none"}}))
    assert answered.content[0].type == "text"


@exercises("messages", "structured output")
def structured_output(server: Server) -> None:
    fields: Any = SHORT | {"model": server.model, "max_tokens": 120, "output_format": Animal}
    assert isinstance(Anthropic(**options(server)).messages.parse(**fields).parsed_output, Animal)


@exercises("messages", "usage")
def counted_tokens(server: Server) -> None:
    client = Anthropic(**options(server))
    counted = client.messages.count_tokens(model=server.model, system=SHORT["system"], messages=SHORT["messages"])
    usage = client.messages.create(**(SHORT | {"model": server.model})).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens > 0


@exercises("models")
def models(server: Server) -> None:
    assert [model.id for model in Anthropic(**options(server)).models.list()] == [server.model]


@exercises("errors")
def errors(server: Server) -> None:
    client = Anthropic(**options(server))
    wrong: list[tuple[Anthropic, dict[str, Any], type[anthropic.APIStatusError], str]] = [
        (client.with_options(api_key="wrong"), {}, anthropic.AuthenticationError, ""),
        (client, {"model": "other"}, anthropic.NotFoundError, "other"),
        (client, {"extra_body": {"temperature": 3}}, anthropic.BadRequestError, "temperature"),
    ]
    for asked, fields, kind, said in wrong:
        error = refused(kind, asked.messages.create, **(SHORT | {"model": server.model} | fields))
        assert said in error.message
        assert error.request_id
