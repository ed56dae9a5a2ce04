"""The grammar of an answer in the harmony format, in llguidance's dialect of Lark.

It allows a subset of what `server.text.parsers.harmony` reads. Reasoning is free, in messages before the one that the
grammar is about. A call ends the model's turn, so there is one call in an answer.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial

from server.constrained.json_schema import normalize_schema
from server.constrained.marker_writer import ANYTHING, MarkerWriter
from server.constrained.tool_grammar import arguments_rule
from server.schemas.tools import Tool, ToolChoice, callable_tools, must_call
from server.text.parsers.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, NAMESPACE, START, HarmonyFormat


def harmony_grammar(
    format: HarmonyFormat,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    *,
    special_ids: Mapping[str, int] | None = None,
    has_content_grammar: bool = False,
    allow_additional_properties: bool = False,
) -> str | None:
    """Return the grammar of the whole output, or None if it may be any text. The arguments are `tool_grammar`'s."""
    allowed = callable_tools(tools, tool_choice)
    is_forced = must_call(tool_choice)
    if not is_forced and not has_content_grammar and not any(tool.function.strict for tool in allowed):
        return None
    markers = MarkerWriter(special_ids or {})
    start, channel, constrain, message = (
        f'{markers.write(each)} " "?' for each in (START, CHANNEL, CONSTRAIN, MESSAGE)
    )
    as_schema = partial(normalize_schema, allow_additional_properties=allow_additional_properties)
    content = "@content" if has_content_grammar else "TEXT"
    # With a grammar for content, a message before a call would be content that does not follow it.
    earlier = ["analysis"] if has_content_grammar else ["analysis", "commentary"]
    last = ([] if is_forced else [f"final {content}"]) + [f"call_{index}" for index in range(len(allowed))]
    whole = "answer"
    if format.is_final:
        whole = "text_end answer" if is_forced else content if has_content_grammar else f"{content} | text_end answer"
    rules = [
        "%llguidance {}",
        f"start: {whole}",
        f"answer: earlier* ({' | '.join(last)})",
        f"earlier: {channel} ({' | '.join(map(json.dumps, earlier))}) {message} text_end",
        f'text_end: text {start} "assistant"',
        markers.up_to("text", "TEXT", END),
        f'final: {channel} "final" type? {message}',
        f'type: " "? {constrain} "json" | " json"',
        f"TEXT: /{ANYTHING}/",
    ]
    for index, tool in enumerate(allowed):
        recipient = json.dumps(f" to={NAMESPACE}{tool.name}")
        header = f'({channel} "commentary" {recipient} | {recipient} {channel} "commentary") type? {message}'
        rules.append(f"call_{index}: {header} arguments_{index}")
        rules.append(arguments_rule(index, tool, is_forced=is_forced, as_schema=as_schema))
    return "\n".join(rules) + "\n"
