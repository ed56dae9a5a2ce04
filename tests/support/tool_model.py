"""A model folder whose chat template writes tools, calls and reasoning as Qwen's do, and helpers for its tests."""

import copy
from pathlib import Path
from typing import Any

from openai.lib.streaming._deltas import accumulate_delta

from tests.support.clients import CHAT, ask_json
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import write_tiny_model

TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>tools' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if documents %}{{- '<|im_start|>' + (documents | tojson) + '<|im_end|>\n' }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking %}{{- '<think>\n' }}{%- endif %}
{%- endif %}"""
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "How it is", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
TIME_CALL = '<tool_call>{"name": "time"}</tool_call>'


def write_tool_model(folder: Path, *, special_tags: bool) -> Path:
    """Write the model folder. With `special_tags` the tags are control tokens, as in some models."""
    return write_tiny_model(folder, *(TAGS if special_tags else ()), template=TEMPLATE)


def say(server: RunningServer, text: str) -> None:
    """Set the text that the model generates."""
    server.engine.config.reply = server.model.tokenizer.encode(text, add_special_tokens=False)


def prompt(server: RunningServer, **fields: Any) -> str:
    """Send a request and return its prompt as text."""
    ask_json(server.url, CHAT, **fields)
    return server.model.tokenizer.decode(server.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)


def messages_of(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the messages of a stream, accumulated as OpenAI's clients do. A delta must add to only one field."""
    messages: dict[int, Any] = {}
    for choice in (choice for chunk in copy.deepcopy(chunks) for choice in chunk["choices"]):
        message, delta = messages.setdefault(choice["index"], {"content": ""}), choice["delta"]
        assert len({"content", "reasoning", "tool_calls"} & delta.keys()) <= 1, delta
        assert len(delta.get("tool_calls", ())) <= 1, delta
        for call in delta.get("tool_calls", ()):
            is_new = call["index"] == len(message.get("tool_calls", ()))
            assert set(call) == {"index", "function", *(("id", "type") if is_new else ())}
        accumulate_delta(message, delta)
    for message in messages.values():
        message.pop("role", None)
        for call in message.get("tool_calls", ()):
            del call["index"]
    return messages
