"""Tools for models whose chat template does not support them, or not all of them: the system message describes them.

The instructions ask the model to write calls in the format `tool_formats.GENERIC`; earlier calls are shown in it too.
"""

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

INSTRUCTIONS = """\
You may call these functions:
{tools}

To call one, answer with nothing but a JSON object {{"name": its name, "arguments": an object}}.
To call several, answer with an array of such objects. You will be given what they return.
Where no function is needed, answer as usual."""


def describe_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Return the messages with the tools described in the system message, and with earlier calls written as content."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    instructions = INSTRUCTIONS.format(tools=functions)
    written = [_write_calls(message) for message in messages]
    if not (written and written[0]["role"] == "system"):
        return [{"role": "system", "content": instructions}, *written]
    return [{**written[0], "content": append_text(written[0]["content"], instructions, "\n\n")}, *written[1:]]


def with_descriptions(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with an empty description wherever its function or a parameter has none."""
    function = _described(tool["function"])
    parameters = function.get("parameters", {})
    if isinstance(properties := parameters.get("properties"), dict):
        described = {name: _described(schema) for name, schema in properties.items()}
        function["parameters"] = {**parameters, "properties": described}
    return {**tool, "function": function}


def _described(value: Any) -> Any:
    return {"description": "", **value} if isinstance(value, dict) else value


def _write_calls(message: Message) -> Message:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**others, "content": append_text(message["content"], text, "\n\n")}


def append_text(content: Any, text: str, separator: str = "") -> Any:
    """Append text to a content, which is a string, a list of parts, or None."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}{separator}{text}" if content else text
