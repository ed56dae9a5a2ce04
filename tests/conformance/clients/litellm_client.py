"""LiteLLM, with the server as an OpenAI-compatible provider."""

import json
from typing import Any

import litellm

from tests.conformance.clients.harness import CITIES, PARAMETERS, QUESTION, SECONDS, Animal, Server, exercises, refused

MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


def options(server: Server) -> dict[str, Any]:
    """Return options for a short answer."""
    fields = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0.8, "seed": 4, "num_retries": 0}
    place = {"api_base": server.base_url, "api_key": server.key, "timeout": SECONDS}
    return fields | place | {"model": f"openai/{server.model}"}


@exercises("chat", "streaming", "usage")
def answer_and_stream(server: Server) -> None:
    answer = litellm.completion(**options(server))
    chunks = list(litellm.completion(**options(server), stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content != ""
    assert answer.usage.completion_tokens == chunks[-1].usage.completion_tokens == 8


@exercises("async", "streaming")
async def asynchronous(server: Server) -> None:
    answer = await litellm.acompletion(**options(server))
    stream = await litellm.acompletion(**options(server), stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer.choices[0].message.content != ""


@exercises("tools", "streaming")
def tools(server: Server) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for tool_choice in ("required", named):
        fields = options(server) | {"tools": [WEATHER], "tool_choice": tool_choice, "max_tokens": 60}
        fields["parallel_tool_calls"] = False
        (call,) = litellm.completion(**fields).choices[0].message.tool_calls
        whole = litellm.stream_chunk_builder(list(litellm.completion(**fields, stream=True)))
        (streamed,) = whole.choices[0].message.tool_calls
        assert call.function.name == streamed.function.name == "get_weather"
        assert call.function.arguments == streamed.function.arguments
        assert json.loads(call.function.arguments)["city"] in CITIES


@exercises("structured output")
def structured_output(server: Server) -> None:
    fields = options(server) | {"response_format": Animal, "max_tokens": 120}
    Animal.model_validate_json(litellm.completion(**fields).choices[0].message.content)


@exercises("logprobs")
def logprobs(server: Server) -> None:
    (choice,) = litellm.completion(**options(server), logprobs=True, top_logprobs=2).choices
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


@exercises("completions")
def completions(server: Server) -> None:
    fields = options(server) | {"model": f"text-completion-openai/{server.model}", "prompt": "Once upon a time"}
    del fields["messages"]
    answer = litellm.text_completion(**fields)
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 8


@exercises("errors")
def errors(server: Server) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"api_key": "wrong"}, litellm.AuthenticationError, ""),
        ({"model": "openai/gpt-4"}, litellm.NotFoundError, "gpt-4"),
        ({"temperature": 3}, litellm.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, litellm.ContextWindowExceededError, "4096"),
    ]
    for fields, kind, said in wrong:
        assert said in str(refused(kind, litellm.completion, **(options(server) | fields)))
