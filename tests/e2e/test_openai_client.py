"""Tests with OpenAI's official Python client, synchronous and asynchronous, with and without streaming.

Chat responses are validated strictly. For completions the client's schema rejects what OpenAI itself sends: chunks
without a finish reason, and a first token without a log probability.
"""

import math
import operator
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France? 🗼"}]},
    ],
    "max_completion_tokens": 12,
    "temperature": 0.8,
    "seed": 4,
}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "Die Grüße aus 東京", "max_tokens": 12, "seed": 4, "n": 2}
OPTIONS: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": REQUEST_SECONDS}
STRICT: dict[str, Any] = OPTIONS | {"_strict_response_validation": True}
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", **OPTIONS) as client:
        yield client


@pytest.fixture
def strict_client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", **STRICT) as client:
        yield client


def check_chat(completion: Any, chunks: list[Any]) -> None:
    """Check that the chunks add up to the completion."""
    (choice,) = completion.choices
    *parts, end, usage = chunks
    assert completion.object == "chat.completion"
    assert choice.message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == choice.message.content != ""
    assert end.choices[0].finish_reason == choice.finish_reason
    assert usage.choices == []
    check_usage(completion.usage, usage.usage)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {completion.id}


def check_completion(completion: Any, chunks: list[Any]) -> None:
    assert completion.object == "text_completion"
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text != ""
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
    assert completion.choices[0].text != completion.choices[1].text
    check_usage(completion.usage, chunks[-1].usage)


def check_usage(one: Any, other: Any) -> None:
    """Check that the token counts are equal. Numbers of cached tokens may differ."""
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(one, name) == getattr(other, name) > 0
    assert one.total_tokens == one.prompt_tokens + one.completion_tokens


def test_chat(strict_client: OpenAI) -> None:
    chunks = list(strict_client.chat.completions.create(**CHAT, **WITH_USAGE))
    check_chat(strict_client.chat.completions.create(**CHAT), chunks)


def test_completions(client: OpenAI) -> None:
    chunks = list(client.completions.create(**COMPLETION, **WITH_USAGE))
    check_completion(client.completions.create(**COMPLETION), chunks)


@pytest.mark.anyio
async def test_chat_async(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", **STRICT) as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, **WITH_USAGE)]
        check_chat(await client.chat.completions.create(**CHAT), chunks)


@pytest.mark.anyio
async def test_completions_async(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", **OPTIONS) as client:
        chunks = [chunk async for chunk in await client.completions.create(**COMPLETION, **WITH_USAGE)]
        check_completion(await client.completions.create(**COMPLETION), chunks)


def test_the_stream_helper(strict_client: OpenAI) -> None:
    with strict_client.chat.completions.stream(**CHAT) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == text != ""


def test_scoring(client: OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "The sky is blue.", "max_tokens": 0, "echo": True, "logprobs": 2}
    (choice,) = client.completions.create(**fields).choices
    assert choice.text == "The sky is blue."
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])


@pytest.mark.checklist("C10")
def test_a_seed_that_was_reported_gives_the_same_answer(client: OpenAI) -> None:
    fields: Any = COMPLETION | {"seed": None}
    raw = client.completions.with_raw_response.create(**fields)
    seed = int(raw.headers["x-lightwell-seed"])
    again = client.completions.create(**(fields | {"seed": seed}))
    assert [choice.text for choice in again.choices] == [choice.text for choice in raw.parse().choices]


def test_cancelling_a_request_by_id(client: OpenAI, server: ServerProcess) -> None:
    chunks = iter(
        client.chat.completions.create(
            **(CHAT | {"max_completion_tokens": 3000, "stream": True}), extra_body={"ignore_eos": True}
        )
    )
    first = next(chunks)
    assert server.http.post(f"/v1/requests/{first.id}/cancel").json() == {"id": first.id, "cancelled": True}
    *_, last = chunks
    assert last.choices[0].finish_reason == "abort"
    assert server.http.post(f"/v1/requests/{first.id}/cancel").status_code == 404


def test_models(strict_client: OpenAI) -> None:
    assert [model.id for model in strict_client.models.list()] == [MODEL]
    assert strict_client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        strict_client.models.retrieve("gpt-4")


def test_errors(client: OpenAI) -> None:
    fields: Any = CHAT | {"model": "gpt-4"}
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(**fields)
    assert not_found.value.code == "model_not_found"
    assert not_found.value.request_id

    fields = CHAT | {"temperature": 3}
    with pytest.raises(openai.BadRequestError) as bad_request:
        client.chat.completions.create(**fields)
    assert bad_request.value.param == "temperature"

    fields = COMPLETION | {"prompt": [5] * 5000, "stream": True}
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(**fields)
    assert too_long.value.code == "context_length_exceeded"


class Animal(BaseModel):
    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=100)
    sound: Literal["meow", "woof"] | None
    friends: list[Literal["cat", "dog"]] = Field(max_length=2)


def test_a_response_is_parsed_into_an_object(strict_client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_completion_tokens": 400, "temperature": 1.2, "seed": 2, "n": 3}
    messages: Any = [{"role": "user", "content": "Invent an animal."}]
    completion = strict_client.chat.completions.parse(model=MODEL, messages=messages, response_format=Animal, **fields)
    assert all(isinstance(choice.message.parsed, Animal) for choice in completion.choices)
    with strict_client.chat.completions.stream(
        model=MODEL, messages=messages, response_format=Animal, **(fields | {"n": 1})
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.content == completion.choices[0].message.content
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"contains": {}}}}
    with pytest.raises(openai.BadRequestError, match="contains") as caught:
        strict_client.chat.completions.create(model=MODEL, messages=messages, response_format=wrong)
    assert caught.value.param == "response_format.json_schema.schema"


def test_structured_outputs_of_completions(client: OpenAI) -> None:
    for outputs, form in (({"regex": r"[0-9]{2}:[0-9]{2}"}, r"\d\d:\d\d"), ({"choice": ["yes", "no"]}, "yes|no")):
        fields = COMPLETION | {"temperature": 1.5, "extra_body": {"structured_outputs": outputs}}
        answer = client.completions.create(**fields)
        assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
        assert all(re.fullmatch(form, choice.text) for choice in answer.choices)


def test_embeddings(client: OpenAI) -> None:
    """Similar texts have a smaller angle. Lists and single inputs, base64 and floats, give the same vectors."""
    texts = ["The cat sleeps on the sofa.", "A cat is asleep on the couch.", "Interest rates rose by 2% in 1994."]
    decoded = client.embeddings.create(model=MODEL, input=texts, user="somebody")
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
    vectors = [item.embedding for item in decoded.data]
    assert vectors[0] == pytest.approx(plain, abs=1e-7)
    assert [len(vector) for vector in vectors] == [576] * 3
    near, far = (sum(map(operator.mul, vectors[0], other)) for other in vectors[1:])
    assert far < near < 1
    assert sum(value * value for value in plain) == pytest.approx(1)
    shorter = client.embeddings.create(model=MODEL, input=texts[0], dimensions=64, encoding_format="float")
    norm = math.hypot(*plain[:64])
    assert shorter.data[0].embedding == pytest.approx([value / norm for value in plain[:64]])
    assert decoded.usage.prompt_tokens == decoded.usage.total_tokens > 20
