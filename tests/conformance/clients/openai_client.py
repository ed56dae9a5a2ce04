"""OpenAI's official client for Python, with strict validation wherever OpenAI's own answers match its schema."""

import json
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

from tests.conformance.clients.harness import CITIES, PARAMETERS, QUESTION, Animal, Server, exercises, refused

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
SHORT: dict[str, Any] = {"messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0.8, "seed": 4}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def client_of(server: Server, *, strict: bool = True) -> OpenAI:
    return OpenAI(**server.options, _strict_response_validation=strict)


@exercises("chat", "usage")
def answer(server: Server) -> None:
    completion = client_of(server).chat.completions.create(model=server.model, **SHORT)
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 8


@exercises("streaming", "usage")
def stream(server: Server) -> None:
    client = client_of(server)
    fields: Any = SHORT | {"model": server.model}
    *chunks, last = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == client.chat.completions.create(**fields).choices[0].message.content != ""
    assert (last.choices, last.usage.completion_tokens) == ([], 8)


@exercises("async", "streaming")
async def asynchronous(server: Server) -> None:
    fields: Any = SHORT | {"model": server.model}
    async with AsyncOpenAI(**server.options, _strict_response_validation=True) as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(**fields, stream=True)]
        completion = await client.chat.completions.create(**fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == completion.choices[0].message.content


@exercises("tools")
def tools(server: Server) -> None:
    client = client_of(server)
    fields: Any = SHORT | {"model": server.model, "tools": [WEATHER], "max_completion_tokens": 60}
    for tool_choice in ("required", NAMED):
        answer = client.chat.completions.create(**fields, tool_choice=tool_choice, parallel_tool_calls=False)
        message = answer.choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in CITIES
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    history = [*MESSAGES, message.model_dump(exclude_none=True), result]
    answered = client.chat.completions.create(**(fields | {"messages": history, "tool_choice": "none"}))
    assert answered.choices[0].message.content


@exercises("tools", "streaming")
def streamed_tools(server: Server) -> None:
    fields: Any = SHORT | {"model": server.model, "tools": [WEATHER], "max_completion_tokens": 60}
    with client_of(server).chat.completions.stream(**fields, tool_choice=NAMED) as events:
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        calls = events.get_final_completion().choices[0].message.tool_calls or []
    assert [event.name for event in done] == ["get_weather"]
    assert [json.loads(call.function.arguments)["city"] in CITIES for call in calls] == [True]


@exercises("structured output", "streaming")
def structured_output(server: Server) -> None:
    fields: Any = SHORT | {"model": server.model, "max_completion_tokens": 120, "response_format": Animal}
    client = client_of(server)
    (choice,) = client.chat.completions.parse(**fields).choices
    assert isinstance(choice.message.parsed, Animal)
    with client.chat.completions.stream(**fields) as events:
        assert events.get_final_completion().choices[0].message.parsed == choice.message.parsed


@exercises("logprobs")
def logprobs(server: Server) -> None:
    fields: Any = SHORT | {"model": server.model, "logprobs": True, "top_logprobs": 2}
    (choice,) = client_of(server).chat.completions.create(**fields).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)


@exercises("completions", "streaming", "logprobs")
def completions(server: Server) -> None:
    # OpenAI's own answers fail strict validation here too.
    with client_of(server, strict=False) as client:
        fields: Any = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 6, "seed": 1, "logprobs": 1}
        completion = client.completions.create(**fields)
        chunks = list(client.completions.create(**fields, stream=True))
    (choice,) = completion.choices
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text == "".join(choice.logprobs.tokens) != ""
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6


@exercises("responses", "streaming", "structured output")
def responses(server: Server) -> None:
    client = client_of(server)
    response = client.responses.create(model=server.model, input="Hello!", max_output_tokens=16)
    assert response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens <= 16
    parsed = client.responses.parse(model=server.model, input="Invent an animal.", text_format=Animal)
    assert isinstance(parsed.output_parsed, Animal)
    with client.responses.stream(
        model=server.model, input="And its friend?", previous_response_id=response.id, text_format=Animal
    ) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == events.get_final_response().output_text != ""


@exercises("models")
def models(server: Server) -> None:
    assert [model.id for model in client_of(server).models.list()] == [server.model]


@exercises("errors")
def errors(server: Server) -> None:
    client = client_of(server)
    wrong: list[tuple[OpenAI, dict[str, Any], type[openai.APIStatusError], str | None]] = [
        (client.with_options(api_key="wrong"), {}, openai.AuthenticationError, None),
        (client, {"model": "gpt-4"}, openai.NotFoundError, "model"),
        (client, {"temperature": 3}, openai.BadRequestError, "temperature"),
        (client, {"temperature": 3, "stream": True}, openai.BadRequestError, "temperature"),
    ]
    for asked, fields, kind, param in wrong:
        error = refused(kind, asked.chat.completions.create, **(SHORT | {"model": server.model} | fields))
        assert (error.param, bool(error.request_id)) == (param, True)
