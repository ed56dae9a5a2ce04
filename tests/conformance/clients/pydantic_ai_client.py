"""Pydantic AI: agents that answer with text, with objects in each output mode, and by calling tools."""

from typing import Any, Literal

from openai import AsyncOpenAI
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.conformance.clients.harness import CITIES, QUESTION, Animal, Server, exercises

SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "seed": 4}


def agent_of(server: Server, kind: Any = OpenAIChatModel, **fields: Any) -> Any:
    provider = OpenAIProvider(openai_client=AsyncOpenAI(**server.options))
    return Agent(kind(server.model, provider=provider), retries=0, **fields)


@exercises("chat", "usage", "async", "streaming")
async def answer_and_stream(server: Server) -> None:
    agent = agent_of(server, instructions="You tell stories.")
    answer = await agent.run(QUESTION, model_settings=SHORT)
    async with agent.run_stream(QUESTION, model_settings=SHORT) as stream:
        text = "".join([part async for part in stream.stream_text(delta=True)])
    assert text == answer.output != ""
    assert answer.usage.output_tokens == stream.usage.output_tokens == 8


@exercises("structured output", "tools")
def structured_output(server: Server) -> None:
    settings = SHORT | {"max_tokens": 120}
    ways = [(NativeOutput(Animal), settings), (ToolOutput(Animal), settings | {"parallel_tool_calls": False})]
    for way, fields in ways:
        answer = agent_of(server, output_type=way, model_settings=fields).run_sync("Invent an animal.")
        assert isinstance(answer.output, Animal)


@exercises("structured output", "async", "streaming")
async def streamed_objects(server: Server) -> None:
    agent = agent_of(server, output_type=NativeOutput(Animal), model_settings=SHORT | {"max_tokens": 120})
    async with agent.run_stream("Invent an animal.") as stream:
        *_, last = [part async for part in stream.stream_output()]
    assert isinstance(last, Animal)


class CallFirst(AbstractCapability):  # type: ignore[misc]
    """Force a call in the first step, and text in the second."""

    def get_model_settings(self) -> Any:
        return lambda context: {"tool_choice": ["get_weather"] if context.run_step == 1 else "none"}


@exercises("tools")
def tools(server: Server) -> None:
    asked = []

    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather now."""
        asked.append(city)
        return "Rain."

    settings = SHORT | {"max_tokens": 60, "parallel_tool_calls": False}
    agent = agent_of(server, tools=[get_weather], capabilities=[CallFirst()], model_settings=settings)
    assert agent.run_sync("What is the weather in Paris?").output
    assert len(asked) == 1
    assert asked[0] in CITIES


@exercises("responses")
def responses(server: Server) -> None:
    settings = {"max_tokens": 16, "temperature": 0}
    assert agent_of(server, OpenAIResponsesModel).run_sync(QUESTION, model_settings=settings).output
