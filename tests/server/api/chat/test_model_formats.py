"""Chats with models whose templates write calls and reasoning in forms of their own, over a real socket."""

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.support.clients import CHAT, ask, ask_json, ask_stream
from tests.support.serving import check_error
from tests.support.tool_model import messages_of, say
from tests.support.tool_templates import FOLDER, PARAMETERS

ARGUMENTS = {"city": 'São "Paulo"', "days": 3, "options": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
ANSWERS = {
    "Qwen3.5-4B": (
        "Hm</think>\n\n<tool_call>\n<function=get_weather>\n"
        '<parameter=city>\nSão "Paulo"\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
        '<parameter=options>\n{"x": 1}\n</parameter>\n</function>\n</tool_call>'
    ),
    "poolside-Laguna-S-2.1": (
        'Hm</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>São "Paulo"</arg_value>'
        "<arg_key>days</arg_key><arg_value>3</arg_value><arg_key>options</arg_key>"
        '<arg_value>{"x": 1}</arg_value></tool_call>'
    ),
    "google-gemma-4-31B-it": (
        "<|channel>thought\nHm\n<channel|><|tool_call>call:get_weather"
        '{city:<|"|>São "Paulo"<|"|>,days:3,options:{x:1}}<tool_call|>'
    ),
    "Kimi-K3": (
        "Hm<|close|>think<|sep|><|open|>response<|sep|><|close|>response<|sep|><|open|>tools<|sep|>"
        '<|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>São "Paulo"'
        '<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
        '<|open|>argument key="options" type="object"<|sep|>{"x": 1}<|close|>argument<|sep|><|close|>call<|sep|>'
        "<|close|>tools<|sep|><|close|>message<|sep|>"
    ),
}
FORMATS = {
    "Qwen3.5-4B": ("qwen3_coder", "<think>"),
    "poolside-Laguna-S-2.1": ("glm", "<think>"),
    "google-gemma-4-31B-it": ("gemma4", "<|channel>thought"),
    "Kimi-K3": ("kimi_k3", "<|open|>think<|sep|>"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_reasoning_and_calls(name: str, start_server: StartServer) -> None:
    server = start_server(chat_template=str(FOLDER / f"{name}.jinja"))
    (model, *_) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["tool_format"], model["reasoning_format"]) == FORMATS[name]
    say(server, ANSWERS[name])
    fields: dict[str, Any] = {"tools": [TOOL], "max_tokens": 2000, "chat_template_kwargs": {"enable_thinking": True}}
    fields |= {} if name == "poolside-Laguna-S-2.1" else {"tool_choice": "required"}
    (choice,) = ask_json(server.url, CHAT, **fields)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert (choice["message"]["reasoning"], choice["message"]["content"] or "") == ("Hm", "")
    assert choice["finish_reason"] == "tool_calls"
    grammar = server.engine.submits[-1].params.grammar
    assert (grammar is not None) == ("tool_choice" in fields)
    streamed = messages_of(ask_stream(server.url, CHAT, **fields))[0]
    assert streamed["tool_calls"][0]["function"] == call["function"]
    assert (streamed["reasoning"], streamed["content"]) == ("Hm", "")


def test_schemas_that_the_format_cannot_follow(start_server: StartServer) -> None:
    server = start_server(chat_template=str(FOLDER / "Qwen3-Coder.jinja"))
    parameters = {"type": "object", "patternProperties": {"^a": {"type": "string"}}}
    tools = [TOOL, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = ask(server.url, CHAT, tools=tools, tool_choice="required")
    error = check_error(answer, 400)
    assert error["param"] == "tools[1].function.parameters"
    assert "'patternProperties' is not supported in this model's format of tool calls" in error["message"]


def test_what_is_not_recognized_is_logged(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}"
        "{% if enable_thinking %}{% endif %}{{ tools | tojson if tools else '' }}"
    )
    (tmp_path / "template.jinja").write_text(source)
    caplog.set_level(logging.WARNING)
    server = start_server(chat_template=str(tmp_path / "template.jinja"))
    messages = [record.getMessage() for record in caplog.records if record.name == "lightwell.api"]
    assert sum("tool calls in a form that is not recognized" in message for message in messages) == 1
    assert sum("its tags are not recognized" in message for message in messages) == 1
    (model, *_) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["tool_format"], model["reasoning_format"]) == ("unrecognized", "unrecognized")
    say(server, '{"name": "get_weather", "arguments": {"city": "x"}}')
    (choice,) = ask_json(server.url, CHAT, tools=[TOOL])["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
