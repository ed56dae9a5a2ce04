"""Ollama's official client."""

from typing import Any

import ollama

from tests.conformance.clients.harness import QUESTION, SECONDS, Animal, Server, exercises, refused

MESSAGES = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": QUESTION}]
CALL = {  # a format that makes the model write a call, since this API has no other way to force one
    "type": "object",
    "properties": {"name": {"const": "get_weather"}, "arguments": {"type": "object"}},
    "required": ["name", "arguments"],
}
OPTIONS = {"num_predict": 8, "temperature": 0.8, "seed": 4, "num_ctx": 2048}
TOO_MANY = {"stop": [f"stop {number}" for number in range(65)]}


def get_weather(city: str) -> str:
    """Get the weather now.

    Args:
        city: The name of a city.
    """
    return f"Rain in {city}."


def connection(server: Server) -> dict[str, Any]:
    return {"host": server.url, "headers": {"authorization": f"Bearer {server.key}"}, "timeout": SECONDS}


def client_of(server: Server) -> ollama.Client:
    return ollama.Client(**connection(server))


@exercises("chat", "streaming", "usage")
def answer_and_stream(server: Server) -> None:
    client = client_of(server)
    answer = client.chat(server.model, MESSAGES, options=OPTIONS, keep_alive="5m")
    *chunks, last = client.chat(server.model, MESSAGES, options=OPTIONS, stream=True)
    assert "".join(chunk.message.content or "" for chunk in [*chunks, last]) == answer.message.content != ""
    assert (last.done, last.done_reason, answer.done_reason) == (True, "length", "length")
    assert last.eval_count == answer.eval_count == 8
    assert (last.prompt_eval_count or 0) > 8
    assert (last.total_duration or 0) >= (last.prompt_eval_duration or 0) + (last.eval_duration or 0) > 0


@exercises("async", "streaming")
async def asynchronous(server: Server) -> None:
    client = ollama.AsyncClient(**connection(server))
    answer = await client.chat(server.model, MESSAGES, options=OPTIONS)
    stream = await client.chat(server.model, MESSAGES, options=OPTIONS, stream=True)
    assert "".join([chunk.message.content or "" async for chunk in stream]) == answer.message.content != ""


@exercises("tools", "streaming")
def tools(server: Server) -> None:
    client = client_of(server)
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    fields: dict[str, Any] = {"tools": [get_weather], "format": CALL, "options": OPTIONS | {"num_predict": 60}}
    answer = client.chat(server.model, messages, **fields)
    [asked] = list(answer.message.tool_calls or ())
    assert asked.function.name == "get_weather"
    assert isinstance(asked.function.arguments, dict)
    chunks = list(client.chat(server.model, messages, **fields, stream=True))
    assert [each for chunk in chunks for each in chunk.message.tool_calls or ()] == [asked]
    messages += [answer.message, {"role": "tool", "tool_name": "get_weather", "content": get_weather("Paris")}]
    assert client.chat(server.model, messages, tools=[get_weather], options=OPTIONS).message.content


@exercises("structured output", "streaming")
def structured_output(server: Server) -> None:
    client, options = client_of(server), OPTIONS | {"num_predict": 120}
    form, prompt = Animal.model_json_schema(), "Invent an animal."
    answer = client.chat(server.model, [{"role": "user", "content": prompt}], format=form, options=options)
    Animal.model_validate_json(answer.message.content or "")
    stream = client.generate(server.model, prompt, format=form, options=options, stream=True)
    Animal.model_validate_json("".join(chunk.response or "" for chunk in stream))


@exercises("logprobs")
def logprobs(server: Server) -> None:
    answer = client_of(server).chat(server.model, MESSAGES, options=OPTIONS, logprobs=True, top_logprobs=2)
    tokens = answer.logprobs or ()
    assert "".join(token.token for token in tokens) == answer.message.content
    assert all(len(token.top_logprobs or ()) == 2 for token in tokens)


@exercises("completions", "streaming")
def generate(server: Server) -> None:
    client = client_of(server)
    for raw in (False, True):
        answer = client.generate(server.model, "Once upon a time", raw=raw, options=OPTIONS)
        chunks = client.generate(server.model, "Once upon a time", raw=raw, options=OPTIONS, stream=True)
        assert "".join(chunk.response or "" for chunk in chunks) == answer.response != ""
    first = client.generate(server.model, "Hello", options=OPTIONS)
    second = client.generate(server.model, "And?", context=first.context, options=OPTIONS)
    assert (second.prompt_eval_count or 0) > len(first.context or ()) > 8
    assert client.generate(server.model).done_reason == client.chat(server.model).done_reason == "load"
    assert client.generate(server.model, keep_alive=0).done_reason == "unload"


@exercises("embeddings")
def embeddings(server: Server) -> None:
    client = client_of(server)
    one, several = client.embed(server.model, "Hello"), client.embed(server.model, ["Hello", "world"], dimensions=8)
    assert [len(vector) for vector in several.embeddings] == [8, 8]
    assert client.embeddings(server.model, "Hello").embedding == one.embeddings[0]
    assert abs(sum(value * value for value in one.embeddings[0]) - 1) < 1e-3


@exercises("models")
def models(server: Server) -> None:
    client = client_of(server)
    (listed,), (loaded,) = client.list().models, client.ps().models
    assert listed.model == loaded.model == f"{server.model}:latest"
    assert (listed.size or 0) > 10**7
    shown = client.show(listed.model)
    assert "completion" in (shown.capabilities or ())
    architecture = (shown.modelinfo or {})["general.architecture"]
    assert (shown.modelinfo or {})[f"{architecture}.context_length"] == loaded.context_length == 4096
    assert (shown.details or ollama.ShowResponse.ModelDetails()).format == "gguf"


@exercises("errors")
def errors(server: Server) -> None:
    client = client_of(server)
    stranger = ollama.Client(host=server.url, headers={"authorization": "Bearer wrong"})
    wrong: list[tuple[Any, dict[str, Any], int, str]] = [
        (stranger.chat, {}, 401, "key"),
        (client.chat, {"model": "gpt-4"}, 404, "gpt-4"),
        (client.chat, {"options": TOO_MANY}, 400, "options.stop"),
    ]
    for ask, fields, status, text in wrong:
        error = refused(ollama.ResponseError, ask, **({"model": server.model, "messages": MESSAGES} | fields))
        assert (error.status_code, text in error.error) == (status, True), error
    stream = client.chat(server.model, MESSAGES, options=TOO_MANY, stream=True)
    assert refused(ollama.ResponseError, lambda: list(stream)).status_code == 400
    assert refused(ollama.ResponseError, client.pull, model="llama3.2").status_code == 501
    assert refused(ollama.ResponseError, client.delete, model=server.model).status_code == 501
