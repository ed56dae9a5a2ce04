"""The official Python clients with a real model: streams add up to whole answers, and dialects agree.

Chat, responses and messages are validated strictly. For completions OpenAI's schema rejects what OpenAI itself sends:
chunks without a finish reason, and a first token without a log probability. `tests/conformance` has many more clients.
"""

import json
import operator
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess

SYSTEM, QUESTION = "You answer in one short sentence.", "What is the capital of France? 🗼"
MESSAGES: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
SAMPLED: dict[str, Any] = {"model": MODEL, "temperature": 0.8, "extra_body": {"seed": 4}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
OPTIONS: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": REQUEST_SECONDS}
STRICT: dict[str, Any] = OPTIONS | {"_strict_response_validation": True}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", **STRICT) as client:
        yield client


@pytest.fixture
def anthropic_client(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, **STRICT) as client:
        yield client


def check_usage(one: Any, other: Any) -> None:
    """Check that the token counts are equal. Numbers of cached tokens may differ."""
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(one, name) == getattr(other, name) > 0
    assert one.total_tokens == one.prompt_tokens + one.completion_tokens


def test_chat(client: OpenAI) -> None:
    fields: dict[str, Any] = SAMPLED | {"messages": MESSAGES, "max_completion_tokens": 12}
    *parts, end, usage = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    completion = client.chat.completions.create(**fields)
    (choice,) = completion.choices
    assert choice.message.role == parts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == choice.message.content != ""
    assert end.choices[0].finish_reason == choice.finish_reason
    check_usage(completion.usage, usage.usage)


def test_completions(server: ServerProcess) -> None:
    """Two choices, of which one does not repeat the other."""
    client = OpenAI(base_url=f"{server.url}/v1", **OPTIONS)
    fields: dict[str, Any] = SAMPLED | {"prompt": "Die Grüße aus 東京", "max_tokens": 12, "n": 2}
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    completion = client.completions.create(**fields)
    for choice in completion.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text != ""
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
    assert completion.choices[0].text != completion.choices[1].text
    check_usage(completion.usage, chunks[-1].usage)


@pytest.mark.checklist("C10")
def test_a_seed_that_was_reported_gives_the_same_answer(server: ServerProcess) -> None:
    body: dict[str, Any] = {"prompt": "Once", "max_tokens": 20, "temperature": 1.5}
    first = server.complete(**body, lightwell={"explain": True})
    seed = first.json()["lightwell"]["seed"]
    assert int(first.headers["x-lightwell-seed"]) == seed
    assert server.complete(**body, seed=seed).json()["choices"] == first.json()["choices"]


def test_responses(client: OpenAI, server: ServerProcess) -> None:
    """The text is that of chat completions."""
    request: dict[str, Any] = SAMPLED | {"instructions": SYSTEM, "input": QUESTION, "max_output_tokens": 6}
    response = client.responses.create(**request)
    chat = server.answer("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.8, "seed": 4})
    assert response.output_text == chat["choices"][0]["message"]["content"] != ""
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat["usage"]["prompt_tokens"], 6)


def test_messages(anthropic_client: Anthropic, server: ServerProcess) -> None:
    request: dict[str, Any] = {"model": MODEL, "system": SYSTEM, "messages": MESSAGES[1:], "max_tokens": 6}
    request["extra_body"] = {"seed": 4, "temperature": 0.8}
    message = anthropic_client.messages.create(**request)
    with anthropic_client.messages.stream(**request) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    chat = server.answer("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.8, "seed": 4})
    (block,) = message.content
    assert block.type == "text"
    assert block.text == text == chat["choices"][0]["message"]["content"] != ""
    assert message.stop_reason == streamed.stop_reason == "max_tokens"
    counted = anthropic_client.messages.count_tokens(model=MODEL, system=SYSTEM, messages=MESSAGES[1:])
    for usage in (message.usage, streamed.usage):
        assert usage.output_tokens == 6
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens > 20


def test_a_required_tool_call(client: OpenAI) -> None:
    """A call is forced, even at a high temperature."""
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    fields: dict[str, Any] = {"model": MODEL, "messages": question, "tools": [tool]}
    fields |= {"temperature": 1.5, "seed": 3, "max_completion_tokens": 60, "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "weather"}}
    choices: Any = (("required", "tool_calls"), (named, "stop"))
    for choice, reason in choices:
        (answer,) = client.chat.completions.create(**fields, tool_choice=choice).choices
        called: Any = answer.message.tool_calls
        assert (answer.message.content or "", len(called), answer.finish_reason) == ("", 1, reason)
        assert called[0].function.name == "weather"
        assert len(json.loads(called[0].function.arguments)["city"]) <= 12


class Animal(BaseModel):
    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=100)
    sound: Literal["meow", "woof"] | None
    friends: list[Literal["cat", "dog"]] = Field(max_length=2)


def test_structured_outputs(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Invent an animal."}]}
    fields |= {"max_completion_tokens": 400, "temperature": 1.2, "seed": 2}
    completion = client.chat.completions.parse(**fields, response_format=Animal, n=2)
    assert all(isinstance(choice.message.parsed, Animal) for choice in completion.choices)
    with client.chat.completions.stream(**fields, response_format=Animal) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.content == completion.choices[0].message.content


def test_embeddings(server: ServerProcess) -> None:
    """Similar texts have a smaller angle. Lists and single inputs, base64 and floats, give the same vectors."""
    client = OpenAI(base_url=f"{server.url}/v1", **OPTIONS)  # the strict one wants no base64
    texts = ["The cat sleeps on the sofa.", "A cat is asleep on the couch.", "Interest rates rose by 2% in 1994."]
    decoded = client.embeddings.create(model=MODEL, input=texts)
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
    vectors = [item.embedding for item in decoded.data]
    assert vectors[0] == pytest.approx(plain, abs=1e-7)
    near, far = (sum(map(operator.mul, vectors[0], other)) for other in vectors[1:])
    assert far < near < 1
    assert sum(value * value for value in plain) == pytest.approx(1)
