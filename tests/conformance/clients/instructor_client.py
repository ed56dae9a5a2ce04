"""Instructor, which parses answers into objects, in each of its modes and without retries."""

from typing import Any

import instructor
from openai import AsyncOpenAI, OpenAI

from tests.conformance.clients.harness import Animal, Server, exercises

MODES = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT)


def request(server: Server) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Invent an animal."}]
    fixed = {"max_tokens": 120, "temperature": 0.8, "seed": 4, "max_retries": 0}
    return {"model": server.model, "messages": messages, "response_model": Animal, **fixed}


def client_of(server: Server, mode: Any) -> Any:
    return instructor.from_openai(OpenAI(**server.options), mode=mode)


@exercises("structured output", "tools", "usage")
def an_object(server: Server) -> None:
    for mode in MODES:
        animal, completion = client_of(server, mode).chat.completions.create_with_completion(**request(server))
        assert isinstance(animal, Animal)
        assert completion.usage.completion_tokens > 0


@exercises("async", "structured output", "tools")
async def asynchronous(server: Server) -> None:
    async with AsyncOpenAI(**server.options) as client:
        animal = await instructor.from_openai(client).chat.completions.create(**request(server))
    assert isinstance(animal, Animal)


@exercises("streaming", "structured output", "tools")
def parts_of_an_object(server: Server) -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        *_, last = client_of(server, mode).chat.completions.create_partial(**request(server))
        assert Animal(**last.model_dump())
