"""Requests that programs sent, recorded by try_clients.py and reduced, are answered in the form that they read.

Streams are parsed with the event models of the official clients, which most of the programs use.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anthropic.types
import httpx
import openai.types.responses
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from tests.conformance.programs import PROGRAMS, Program, converse
from tests.conformance.scripted_server import GREETING, ScriptedServer, scripted_server
from tests.conformance.table import ENVIRONMENTS, FOLDER, REPLAYS

ANTHROPIC_EVENT: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
RESPONSES_EVENT: TypeAdapter[Any] = TypeAdapter(openai.types.responses.ResponseStreamEvent)
ARGUMENTS = {"place": "東京"}

RECORDED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPLAYS.glob("*.json"))}
REQUESTS = [
    pytest.param(request, id=f"{name}-{number}")
    for name, replay in RECORDED.items()
    for number, request in enumerate(replay["requests"])
]


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_recorded_request_is_answered(request_: dict[str, Any], server: ScriptedServer) -> None:
    """Text is answered to the last request of a tool's result; a call of the first tool to others that have tools."""
    body = request_["body"]
    names = [function_name(tool) for tool in (body or {}).get("tools") or ()]
    server.script.tool, server.script.arguments = next(filter(None, names), ""), ARGUMENTS
    url, headers = server.url + request_["path"], request_["headers"]
    response = httpx.request(request_["method"], url, headers=headers, json=body, timeout=30)
    assert response.status_code == 200, response.text
    warnings = response.headers.get("x-lightwell-warnings", "")
    assert without_indices(warnings) == without_indices(request_["warnings"])  # some tools were left out
    path = request_["path"].partition("?")[0]
    text, call = READERS[path, bool((body or {}).get("stream"))](response.text)
    if call is not None:
        assert call == (server.script.tool, ARGUMENTS)
    elif text is not None:
        assert text.startswith((GREETING[: body.get("max_tokens")], "It says: "))


def without_indices(text: str) -> str:
    return re.sub(r"\d+", "", text)


def function_name(tool: dict[str, Any]) -> str:
    """Return the name of a function tool of any API, or "" if it is another kind of tool."""
    if tool.get("type", "function") not in {"function", "custom"} or "format" in tool:
        return ""
    return str(tool.get("name") or tool["function"]["name"])


Answer = tuple[str | None, tuple[str, Any] | None]  # text, and the name and arguments of the first call


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def read_message(text: str) -> Answer:
    message = anthropic.types.Message.model_validate_json(text)
    call = next((block for block in message.content if block.type == "tool_use"), None)
    answer = "".join(block.text for block in message.content if block.type == "text")
    return answer, None if call is None else (call.name, call.input)


def read_message_stream(text: str) -> Answer:
    parsed = [ANTHROPIC_EVENT.validate_python(event) for event in events(text)]
    assert [event.type for event in (parsed[0], *parsed[-2:])] == ["message_start", "message_delta", "message_stop"]
    blocks = [event.content_block for event in parsed if event.type == "content_block_start"]
    deltas = [event.delta for event in parsed if event.type == "content_block_delta"]
    call = next((block for block in blocks if block.type == "tool_use"), None)
    assert parsed[-2].delta.stop_reason == ("end_turn" if call is None else "tool_use")
    arguments = "".join(delta.partial_json for delta in deltas if delta.type == "input_json_delta")
    answer = "".join(delta.text for delta in deltas if delta.type == "text_delta")
    return answer, None if call is None else (call.name, json.loads(arguments))


def read_chat(text: str) -> Answer:
    (choice,) = ChatCompletion.model_validate_json(text).choices
    calls: Any = choice.message.tool_calls
    return choice.message.content, (calls[0].function.name, json.loads(calls[0].function.arguments)) if calls else None


def read_chat_stream(text: str) -> Answer:
    """Read a stream as the strictest clients do: at most one kind of addition per chunk."""
    content, name, arguments, reason = "", "", "", None
    for chunk in (ChatCompletionChunk.model_validate(event) for event in events(text)):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            content += choice.delta.content or ""
            assert not (choice.delta.content and choice.delta.tool_calls)
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert reason == ("tool_calls" if name else "stop")
    return content, (name, json.loads(arguments)) if name else None


def read_response(text: str) -> Answer:
    return _response(openai.types.responses.Response.model_validate_json(text))


def read_response_stream(text: str) -> Answer:
    last = [RESPONSES_EVENT.validate_python(event) for event in events(text)][-1]
    assert last.type == "response.completed"
    return _response(last.response)


def _response(response: Any) -> Answer:
    call = next((item for item in response.output if item.type == "function_call"), None)
    return response.output_text, None if call is None else (call.name, json.loads(call.arguments))


def read_completion(text: str) -> Answer:
    return Completion.model_validate_json(text).choices[0].text, None


def read_completion_stream(text: str) -> Answer:
    *pieces, last = (choice for event in events(text) for choice in event["choices"])  # typed for whole answers only
    assert [choice["finish_reason"] for choice in pieces] == [None] * len(pieces)
    assert last["finish_reason"] in {"stop", "length"}
    return "".join(choice["text"] for choice in (*pieces, last)), None


class Models(BaseModel):
    data: list[Model]


class Embedding(BaseModel):
    embedding: list[float] | str  # base64 where the client asks for it


class Embeddings(BaseModel):
    data: list[Embedding]


def read_other(kind: Any, text: str) -> Answer:
    kind.model_validate_json(text)
    return None, None


READERS: dict[tuple[str, bool], Callable[[str], Answer]] = {
    ("/v1/messages", False): read_message,
    ("/v1/messages", True): read_message_stream,
    ("/v1/messages/count_tokens", False): partial(read_other, anthropic.types.MessageTokensCount),
    ("/v1/chat/completions", False): read_chat,
    ("/v1/chat/completions", True): read_chat_stream,
    ("/v1/responses", False): read_response,
    ("/v1/responses", True): read_response_stream,
    ("/v1/completions", False): read_completion,
    ("/v1/completions", True): read_completion_stream,
    ("/v1/embeddings", False): partial(read_other, Embeddings),
    ("/v1/models", False): partial(read_other, Models),
}


@pytest.mark.long
@pytest.mark.parametrize("program", [each for each in PROGRAMS if each.locked], ids=lambda each: each.slug)
def test_program(program: Program, server: ScriptedServer, tmp_path: Path) -> None:
    """Installed from a lock file, a program has a conversation, in which it calls a tool of its own."""
    bin = FOLDER / "npm/node_modules/.bin"
    if program.registry == "npm":
        assert shutil.which("npm"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
    else:
        bin = ENVIRONMENTS / program.locked / "bin"
    assert bin.exists(), "`make test-long` installs the programs"
    trial = converse(program, bin, tmp_path, server)
    assert not trial.failure, f"{trial.failure}\n{trial.output[-3000:]}"
