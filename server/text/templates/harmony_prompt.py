"""Write chat requests as the template of gpt-oss expects them, which differs from what other templates read.

The template names reasoning `thinking`, reads a system message only at the beginning, renders one call per message and
no content before a call, and requires a description of every tool.
https://huggingface.co/openai/gpt-oss-20b/blob/main/chat_template.jinja
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

Message = dict[str, Any]

SEPARATOR = "\n\n"  # between texts that are joined

# Efforts that the model was not trained on -> the nearest one.
EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


def harmony_messages(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with reasoning as `thinking`, and each call in a message of its own before its results.

    All system messages are joined at the beginning.
    """
    system = [_text(message["content"]) for message in messages if message["role"] == "system"]
    written: list[Message] = [{"role": "system", "content": SEPARATOR.join(system)}] if system else []
    turn: list[Message] = []  # the last message that is no result, with its calls in messages of their own
    others = [message for message in messages if message["role"] != "system"]
    for is_result, group in groupby(others, key=lambda message: message["role"] == "tool"):
        if is_result:
            written += _add_results(turn, list(group))
            turn = []
            continue
        for message in group:
            written += turn
            turn = _split_calls(_rename_reasoning(message))
    return written + turn


def harmony_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the template, with a reasoning effort that the model knows."""
    if (effort := options.get("reasoning_effort")) in EFFORTS:
        return {**options, "reasoning_effort": EFFORTS[effort]}
    return options


def _rename_reasoning(message: Message) -> Message:
    """Return a message with its reasoning as `thinking`. Content before calls becomes part of it."""
    others = {**message}
    reasoning, content = others.pop("reasoning_content", None), message.get("content")
    if message.get("tool_calls"):
        reasoning, others["content"] = SEPARATOR.join(filter(None, (reasoning, _text(content)))), ""
    return {**others, "thinking": reasoning} if reasoning else others


def _text(content: Any) -> str:
    """Return the text of a content, which is a string, a list of parts, or None."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _split_calls(message: Message) -> list[Message]:
    """Return a message for each call, of which the first one has the reasoning."""
    calls = message.get("tool_calls")
    if not calls:
        return [message]
    others = [{"role": message["role"], "content": "", "tool_calls": [call]} for call in calls[1:]]
    return [{**message, "tool_calls": calls[:1]}, *others]


def _add_results(turn: Sequence[Message], results: Sequence[Message]) -> list[Message]:
    """Return the messages of a turn, each followed by the results of its call: by id, or in order if there is none."""
    if not turn:
        return [*results]
    index_of = {call["id"]: i for i, each in enumerate(turn) for call in each.get("tool_calls", ()) if "id" in call}
    groups = [[message] for message in turn]
    for position, result in enumerate(results):
        groups[index_of.get(result.get("tool_call_id"), min(position, len(turn) - 1))].append(result)
    return [message for group in groups for message in group]
