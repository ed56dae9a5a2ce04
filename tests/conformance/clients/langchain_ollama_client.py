"""LangChain's ChatOllama."""

from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel

from tests.conformance.clients.harness import SECONDS, Animal, GetWeather, Server, exercises
from tests.conformance.clients.langchain_client import answered, check_asynchronous


class Call(BaseModel):
    """A format that makes the model write a call, since this API has no other way to force one."""

    name: Literal["GetWeather"]
    arguments: dict[str, str]


def connection(server: Server) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {server.key}"}
    return {"model": server.model, "base_url": server.url, "client_kwargs": {"headers": headers, "timeout": SECONDS}}


def model_of(server: Server, **fields: Any) -> Any:
    options = {"temperature": 0.8, "seed": 4, "num_predict": 8, "num_ctx": 2048, "keep_alive": "5m"}
    return ChatOllama(**(connection(server) | {"validate_model_on_init": True} | options | fields))


@exercises("chat", "streaming", "usage")
def answer_and_stream(server: Server) -> None:
    assert answered(model_of(server)).response_metadata["done_reason"] == "length"


@exercises("async", "streaming")
async def asynchronous(server: Server) -> None:
    await check_asynchronous(model_of(server))


@exercises("tools")
def tools(server: Server) -> None:
    model = model_of(server, num_predict=60, format=Call.model_json_schema())
    history: list[Any] = [HumanMessage("What is the weather in Paris?")]
    answer = model.bind_tools([GetWeather]).invoke(history)
    (call,) = answer.tool_calls
    assert (call["name"], isinstance(call["args"], dict)) == ("GetWeather", True)
    history += [answer, ToolMessage("Rain.", tool_call_id=call["id"])]
    assert model_of(server).bind_tools([GetWeather]).invoke(history).content


@exercises("structured output")
def structured_output(server: Server) -> None:
    model = model_of(server, num_predict=120).with_structured_output(Animal, include_raw=True)
    answer = model.invoke("Invent an animal.")
    assert isinstance(answer["parsed"], Animal), answer


@exercises("completions", "streaming")
def completions(server: Server) -> None:
    model = OllamaLLM(**connection(server), seed=4, num_predict=8)
    assert model.invoke("Once upon a time") == "".join(model.stream("Once upon a time")) != ""


@exercises("embeddings")
def embeddings(server: Server) -> None:
    model = OllamaEmbeddings(**connection(server))
    one, other = model.embed_documents(["Hello", "world"])
    assert model.embed_query("Hello") == one != other
