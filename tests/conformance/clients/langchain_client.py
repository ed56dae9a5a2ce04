"""LangChain's ChatOpenAI."""

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.conformance.clients.harness import CITIES, QUESTION, Animal, GetWeather, Server, exercises


def options(server: Server) -> dict[str, Any]:
    return server.options | {"model": server.model, "temperature": 0.8, "seed": 4, "max_tokens": 8}


def model_of(server: Server, **fields: Any) -> Any:
    return ChatOpenAI(**(options(server) | fields))


def answered(model: Any) -> Any:
    """Return an answer of eight tokens, and check that it is the same as a stream."""
    answer = model.invoke([("system", "You tell stories."), ("human", QUESTION)])
    chunks = list(model.stream([("system", "You tell stories."), ("human", QUESTION)]))
    whole = sum(chunks[1:], chunks[0])
    assert answer.content == whole.content != ""
    assert answer.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"] == 8
    return answer


async def check_asynchronous(model: Any) -> None:
    answer = await model.ainvoke(QUESTION)
    assert "".join([chunk.content async for chunk in model.astream(QUESTION)]) == answer.content != ""


@exercises("chat", "streaming", "usage")
def answer_and_stream(server: Server) -> None:
    answered(model_of(server, stream_usage=True))


@exercises("async", "streaming")
async def asynchronous(server: Server) -> None:
    await check_asynchronous(model_of(server))


@exercises("tools", "streaming")
def tools(server: Server) -> None:
    model = model_of(server, max_tokens=60)
    for tool_choice in ("any", "GetWeather"):
        bound = model.bind_tools([GetWeather], tool_choice=tool_choice, parallel_tool_calls=False, strict=True)
        answer = bound.invoke(QUESTION)
        chunks = list(bound.stream(QUESTION))
        (call,), (streamed,) = answer.tool_calls, sum(chunks[1:], chunks[0]).tool_calls
        assert (call["name"], call["args"]) == (streamed["name"], streamed["args"])
        assert (call["name"], call["args"]["city"] in CITIES) == ("GetWeather", True)
    history = [HumanMessage(QUESTION), answer, ToolMessage("Rain.", tool_call_id=call["id"])]
    assert model.bind_tools([GetWeather], tool_choice="none").invoke(history).content


@exercises("structured output", "tools")
def structured_output(server: Server) -> None:
    for method in ("json_schema", "function_calling"):
        fields: Any = {"method": method, "strict": True, "include_raw": True}
        answer = model_of(server, max_tokens=120).with_structured_output(Animal, **fields).invoke("Invent an animal.")
        assert isinstance(answer["parsed"], Animal), answer


@exercises("completions", "streaming")
def completions(server: Server) -> None:
    model = OpenAI(**options(server))
    assert model.invoke("Once upon a time") == "".join(model.stream("Once upon a time")) != ""


@exercises("responses", "streaming")
def responses(server: Server) -> None:
    fields = {"use_responses_api": True, "max_tokens": 16, "seed": None}
    model = model_of(server, temperature=0, **fields)
    chunks = list(model.stream(QUESTION))
    assert model.invoke(QUESTION).text == sum(chunks[1:], chunks[0]).text != ""
