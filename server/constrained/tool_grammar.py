"""The grammar of an answer with forced or strict tool calls, in llguidance's dialect of Lark.

It allows a subset of the calls that `server.text.parsers.tool_parser` reads, in the form in which models are trained to
write them. Everything is literal except the arguments, which follow the tool's JSON schema with a space after commas
and colons. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.constrained.json_schema import normalize_schema
from server.constrained.regex import escape_regex
from server.schemas.tools import NamedTool, Tool, ToolChoice, callable_tools, must_call
from server.text.parsers.answer_parser import AnswerFormat
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import ToolFormat

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANYTHING = r"(.|\n)*"
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    format: AnswerFormat,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    *,
    special_ids: Mapping[str, int] | None = None,
    has_content_grammar: bool = False,
    allow_additional_properties: bool = False,
) -> str | None:
    """Return the grammar of the whole output, or None if it may be any text.

    The arguments of forced calls follow their tools' schemas; otherwise only those of strict tools do. A named tool is
    called once.

    Args:
        tools: the tools of the request, validated.
        special_ids: token ids of the tags and markers that are special tokens, which no text is tokenized to.
        has_content_grammar: an answer without calls must match the grammar `@content`, which the caller adds.
        allow_additional_properties: see `normalize_schema`.
    """
    allowed = callable_tools(tools, tool_choice)
    is_forced = must_call(tool_choice)
    if not is_forced and not has_content_grammar and not any(tool.function.strict for tool in allowed):
        return None
    markers = MarkerWriter(special_ids or {})
    as_schema = partial(normalize_schema, allow_additional_properties=allow_additional_properties)
    tool_format, tags = format.tool_format, format.reasoning_tags
    several = format.parallel_calls and not isinstance(tool_choice, NamedTool)
    begin, calls = _call_expressions(markers, tool_format, several)
    if is_forced:
        answer = [f"answer: {begin} {calls}"]
    elif has_content_grammar:
        answer = [f"answer: {begin} {calls} | @content" if allowed else "answer: @content"]
    else:
        answer = _answer_rules(markers, tool_format, calls)
    no_reasoning = "" if tags is None or format.is_reasoning else markers.without(tags.start)
    rules = [
        "%llguidance {}",
        *_reasoning_rules(markers, tags, format.is_reasoning),
        *answer,
        *_tool_rules(markers, tool_format, allowed, is_forced=is_forced, as_schema=as_schema),
        f"FIRST: TEXT{no_reasoning}",
        f"TEXT: /{ANYTHING}/",
    ]
    return "\n".join(rules) + "\n"


@dataclass(frozen=True, slots=True)
class MarkerWriter:
    """Writes tags and markers as grammar expressions: special tokens by id, everything else as literal text."""

    special_ids: Mapping[str, int]

    def write(self, marker: str) -> str:
        return " ".join(map(self._write_piece, self._pieces(marker)))

    def up_to(self, rule: str, text: str, marker: str) -> str:
        """Return a rule named `rule` for `text` up to and including the first occurrence of the marker."""
        first, *others = self._pieces(marker)
        if first in self.special_ids:
            return f"{rule}: {text} {self.write(marker)}"
        if not others:
            return f"{rule}[lazy]: {text} {_literal(marker)}"
        # The marker begins with plain text, `first`. The text up to the special token after it must end with `first`.
        before = f"{rule.upper()}: {text} & /{ANYTHING}{escape_regex(first)}/"
        return f"{before}\n{rule}: {rule.upper()} {self.write(marker[len(first) :])}"

    def without(self, marker: str, *, anywhere: bool = False) -> str:
        """Return the part of a terminal that excludes the marker at the beginning of its text, or anywhere in it."""
        if marker in self.special_ids:
            return ""
        before = ANYTHING if anywhere else ""
        return f" & ~/{before}{escape_regex(marker)}{ANYTHING}/"

    def _write_piece(self, piece: str) -> str:
        return f"<[{self.special_ids[piece]}]>" if piece in self.special_ids else _literal(piece)

    def _pieces(self, marker: str) -> list[str]:
        """Split a marker at its special tokens."""
        if not self.special_ids:
            return [marker]
        tokens = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        return [piece for piece in re.split(f"({tokens})", marker) if piece] or [marker]


def _reasoning_rules(markers: MarkerWriter, tags: ReasoningTags | None, is_reasoning: bool) -> list[str]:
    """Return the rule `start` and those it needs: an `answer`, preceded by optional reasoning if `tags` is set.

    If the prompt already opened the tag (`is_reasoning`), the reasoning is required.
    """
    if tags is None:
        return ["start: answer"]
    start = "reasoning answer" if is_reasoning else f"{markers.write(tags.start)} reasoning answer | answer"
    return [
        f"start: {start}",
        'reasoning: reasoning_end ("\\n" "\\n"?)?',
        markers.up_to("reasoning_end", "TEXT", tags.end),
    ]


def _answer_rules(markers: MarkerWriter, format: ToolFormat, calls: str) -> list[str]:
    """Return the rule `answer` for optional calls: calls alone, or text that may end with calls."""
    if not format.is_bare:
        return [f"answer: begin_calls {calls} | FIRST", markers.up_to("begin_calls", "FIRST", format.start)]
    # Text that begins with a bracket must be a call.
    plain = r"PLAIN: FIRST & /([^{\[ \t\r\n](.|\n)*)?/" + markers.without(format.start, anywhere=True)
    return [f"answer: {calls} | PLAIN", plain]


def _call_expressions(markers: MarkerWriter, format: ToolFormat, several: bool) -> tuple[str, str]:
    """Return two expressions: of the text before all calls, which may be empty, and of one call or `several`."""
    array = '"[" tool (", " tool)* "]"' if several else '"[" tool "]"'
    if format.is_bare and format.has_arrays:
        return "", f"(tool | {array})" if several else "tool"
    if format.has_arrays:
        return markers.write(format.start), array
    start = "" if format.is_bare else markers.write(format.start)
    call = f'"\\n" tool "\\n" {markers.write(format.end)}' if format.end else "tool"
    between = _literal(f"{format.separator} ") if format.separator else _literal("\n") if format.end else ""
    return start, f"{call} ({between} {start} {call})*" if several else call


def _tool_rules(
    markers: MarkerWriter,
    format: ToolFormat,
    tools: Sequence[Tool],
    *,
    is_forced: bool,
    as_schema: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[str]:
    """Return the rule `tool` for a call of any of the tools, and the rules it refers to."""
    rules = [f"tool: {' | '.join(f'tool_{index}' for index in range(len(tools)))}"] if tools else []
    for index, tool in enumerate(tools):
        if format.has_names and not format.has_arrays:
            call = f"{_literal(tool.name)} {markers.write(format.name_end)} arguments_{index}"
        else:
            # In the same lexemes as JSON schemas, because content may be JSON that begins alike.
            pieces = ["{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{format.arguments_key}"', ": "]
            call = f'{" ".join(map(_literal, pieces))} arguments_{index} "}}"'
        parameters = tool.function.parameters or NO_ARGUMENTS
        schema = parameters if is_forced or tool.function.strict else {}
        arguments = json.dumps({"type": "object", **as_schema(schema), "x-guidance": SPACING})
        rules += [f"tool_{index}: {call}", f"arguments_{index}: %json {arguments}"]
    return rules


def _literal(text: str) -> str:
    return json.dumps(text)
