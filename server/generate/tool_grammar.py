"""The grammar of an answer with calls that are forced or strict, or of one that else is JSON: in llguidance's Lark.

The calls that it allows are some of those that `server.text.tool_parser` reads, in the form in which models learn to
write them. All is literal but the arguments, which follow the tool's JSON schema with a space after commas and colons.
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.schemas.tools import NamedTool, Tool, ToolChoice, callable_tools, must_call
from server.text.reasoning import ThinkTags
from server.text.tool_formats import ToolFormat

# No white space but this: a model could fill an answer with it.
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
ANYTHING = r"(.|\n)*"
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    format: ToolFormat,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    parallel: bool,
    *,
    content_schema: Mapping[str, Any] | None = None,
    think_tags: ThinkTags | None = None,
    is_thinking: bool = False,
    special_ids: Mapping[str, int] | None = None,
) -> str | None:
    """What the whole output must match, or None where it may be any text.

    Where calls are forced, the arguments of all tools follow their schemas; elsewhere those of strict tools do.

    Args:
        tools: those of the request, judged.
        parallel: whether several calls may follow one another. A tool that is named is called once.
        content_schema: the answer is JSON of this schema, unless it is calls. None: it may be any text.
        think_tags: of a model that may think before it answers, or does so (`is_thinking`: the prompt has begun it).
        special_ids: tags and markers that are control tokens, which no text spells -> their token ids.
    """
    allowed = callable_tools(tools, tool_choice)
    is_forced = must_call(tool_choice)
    if not is_forced and content_schema is None and not any(tool.function.strict for tool in allowed):
        return None
    marks = _Marks(special_ids or {})
    begin, calls = _calls(marks, format, parallel and not isinstance(tool_choice, NamedTool))
    if is_forced:
        answer = [f"answer: {begin} {calls}"]
    elif content_schema is None:
        answer = _calls_or_text(marks, format, calls)
    else:
        answer = [f"answer: {begin} {calls} | content" if allowed else "answer: content", _content(content_schema)]
    no_thoughts = "" if think_tags is None or is_thinking else marks.without(think_tags.start)
    rules = [
        "%llguidance {}",
        *_thoughts(marks, think_tags, is_thinking),
        *answer,
        *_tools(marks, format, allowed, is_forced=is_forced),
        f"FIRST: TEXT{no_thoughts}",
        f"TEXT: /{ANYTHING}/",
    ]
    return "\n".join(rules) + "\n"


@dataclass(frozen=True, slots=True)
class _Marks:
    """Writes tags and markers: as a control token where it is one, as text elsewhere."""

    special_ids: Mapping[str, int]

    def write(self, mark: str) -> str:
        return f"<[{self.special_ids[mark]}]>" if mark in self.special_ids else _literal(mark)

    def up_to(self, rule: str, text: str, mark: str) -> str:
        """A rule for text up to the first such mark, with it."""
        laziness = "" if mark in self.special_ids else "[lazy]"
        return f"{rule}{laziness}: {text} {self.write(mark)}"

    def without(self, mark: str, *, anywhere: bool = False) -> str:
        """What keeps a lexeme from having the mark at its beginning, or anywhere."""
        if mark in self.special_ids:
            return ""
        before = ANYTHING if anywhere else ""
        return f" & ~/{before}{re.escape(mark)}{ANYTHING}/"


def _thoughts(marks: _Marks, tags: ThinkTags | None, is_thinking: bool) -> list[str]:
    """The rule `start`: what `answer` is, after thoughts if there may be any."""
    if tags is None:
        return ["start: answer"]
    start = "thoughts answer" if is_thinking else f"{marks.write(tags.start)} thoughts answer | answer"
    return [f"start: {start}", 'thoughts: thoughts_end ("\\n" "\\n"?)?', marks.up_to("thoughts_end", "TEXT", tags.end)]


def _calls_or_text(marks: _Marks, format: ToolFormat, calls: str) -> list[str]:
    """The rule `answer`: calls, or text that may end with calls."""
    if not format.is_bare:
        return [f"answer: begin_calls {calls} | FIRST", marks.up_to("begin_calls", "FIRST", format.start)]
    # Only calls begin with a bracket.
    plain = r"PLAIN: FIRST & /([^{\[ \t\r\n](.|\n)*)?/" + marks.without(format.start, anywhere=True)
    return [f"answer: {calls} | PLAIN", plain]


def _calls(marks: _Marks, format: ToolFormat, several: bool) -> tuple[str, str]:
    """What begins calls, or nothing if they begin by themselves; and one call, or several of them."""
    array = '"[" tool (", " tool)* "]"' if several else '"[" tool "]"'
    if format.is_bare and format.has_arrays:
        return "", f"(tool | {array})" if several else "tool"
    if format.has_arrays:
        return marks.write(format.start), array
    start = "" if format.is_bare else marks.write(format.start)
    call = f'"\\n" tool "\\n" {marks.write(format.end)}' if format.end else "tool"
    between = _literal(f"{format.separator} ") if format.separator else _literal("\n") if format.end else ""
    return start, f"{call} ({between} {start} {call})*" if several else call


def _tools(marks: _Marks, format: ToolFormat, tools: Sequence[Tool], *, is_forced: bool) -> list[str]:
    """The rule `tool`, which is any of them, with its name and its arguments."""
    rules = [f"tool: {' | '.join(f'tool_{index}' for index in range(len(tools)))}"] if tools else []
    for index, tool in enumerate(tools):
        if format.has_names and not format.has_arrays:
            call = f"{_literal(tool.name)} {marks.write(format.name_end)} arguments_{index}"
        else:
            # In the pieces that JSON is read in, for content may be JSON and begin alike.
            pieces = ["{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{format.arguments_key}"', ": "]
            call = f'{" ".join(map(_literal, pieces))} arguments_{index} "}}"'
        parameters = tool.function.parameters or NO_ARGUMENTS
        schema = parameters if is_forced or tool.function.strict else {}
        rules += [f"tool_{index}: {call}", _json(f"arguments_{index}", {"type": "object", **schema}, SPACED)]
    return rules


def _content(schema: Mapping[str, Any]) -> str:
    return _json("content", schema, COMPACT)


def _json(rule: str, schema: Mapping[str, Any], spacing: Mapping[str, Any]) -> str:
    return f"{rule}: %json {json.dumps({**schema, 'x-guidance': spacing})}"


def _literal(text: str) -> str:
    return json.dumps(text)
