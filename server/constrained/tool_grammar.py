"""The grammar of an answer that has to call tools, or that calls them strictly, in llguidance's dialect of Lark.

The calls that it allows are some of those that `server.text.tool_parser` reads, in the form in which models learn to
write them. All is literal but the arguments, which follow the tool's JSON schema with a space after commas and colons.
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.constrained.json_schema import escaped, followable
from server.schemas.tools import NamedTool, Tool, ToolChoice, callable_tools, must_call
from server.text.reasoning import ThinkTags
from server.text.tool_formats import ToolFormat

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANYTHING = r"(.|\n)*"
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    format: ToolFormat,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    parallel: bool,
    *,
    think_tags: ThinkTags | None = None,
    is_thinking: bool = False,
    special_ids: Mapping[str, int] | None = None,
    has_content_grammar: bool = False,
) -> str | None:
    """What the whole output must match, or None where it may be any text.

    Where calls are forced, the arguments of all tools follow their schemas; elsewhere those of strict tools do.

    Args:
        tools: those of the request, judged.
        parallel: whether several calls may follow one another. A tool that is named is called once.
        think_tags: of a model that may think before it answers, or does so (`is_thinking`: the prompt has begun it).
        special_ids: tags and markers that are control tokens, which no text spells -> their token ids.
        has_content_grammar: an answer without calls must match a grammar `@content`, which is to be put beside it.
    """
    allowed = callable_tools(tools, tool_choice)
    is_forced = must_call(tool_choice)
    if not is_forced and not has_content_grammar and not any(tool.function.strict for tool in allowed):
        return None
    marks = Marks(special_ids or {})
    begin, calls = _calls(marks, format, parallel and not isinstance(tool_choice, NamedTool))
    if is_forced:
        answer = [f"answer: {begin} {calls}"]
    elif has_content_grammar:
        answer = [f"answer: {begin} {calls} | @content" if allowed else "answer: @content"]
    else:
        answer = _calls_or_text(marks, format, calls)
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
class Marks:
    """Writes tags and markers: control tokens in them as such, all else as text."""

    special_ids: Mapping[str, int]

    def write(self, mark: str) -> str:
        return " ".join(map(self._write_piece, self._pieces(mark)))

    def up_to(self, rule: str, text: str, mark: str) -> str:
        """A rule for text up to the first such mark, with it."""
        first, *others = self._pieces(mark)
        if first in self.special_ids:
            return f"{rule}: {text} {self.write(mark)}"
        if not others:
            return f"{rule}[lazy]: {text} {_literal(mark)}"
        # What comes before its first control token ends with what it has before it.
        before = f"{rule.upper()}: {text} & /{ANYTHING}{escaped(first)}/"
        return f"{before}\n{rule}: {rule.upper()} {self.write(mark[len(first) :])}"

    def _write_piece(self, piece: str) -> str:
        return f"<[{self.special_ids[piece]}]>" if piece in self.special_ids else _literal(piece)

    def _pieces(self, mark: str) -> list[str]:
        """Cut at its control tokens."""
        if not self.special_ids:
            return [mark]
        cuts = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        return [piece for piece in re.split(f"({cuts})", mark) if piece] or [mark]

    def without(self, mark: str, *, anywhere: bool = False) -> str:
        """What keeps a lexeme from having the mark at its beginning, or anywhere."""
        if mark in self.special_ids:
            return ""
        before = ANYTHING if anywhere else ""
        return f" & ~/{before}{escaped(mark)}{ANYTHING}/"


def _thoughts(marks: Marks, tags: ThinkTags | None, is_thinking: bool) -> list[str]:
    """The rule `start`: what `answer` is, after thoughts if there may be any."""
    if tags is None:
        return ["start: answer"]
    start = "thoughts answer" if is_thinking else f"{marks.write(tags.start)} thoughts answer | answer"
    return [f"start: {start}", 'thoughts: thoughts_end ("\\n" "\\n"?)?', marks.up_to("thoughts_end", "TEXT", tags.end)]


def _calls_or_text(marks: Marks, format: ToolFormat, calls: str) -> list[str]:
    """The rule `answer`: calls, or text that may end with calls."""
    if not format.is_bare:
        return [f"answer: begin_calls {calls} | FIRST", marks.up_to("begin_calls", "FIRST", format.start)]
    # Only calls begin with a bracket.
    plain = r"PLAIN: FIRST & /([^{\[ \t\r\n](.|\n)*)?/" + marks.without(format.start, anywhere=True)
    return [f"answer: {calls} | PLAIN", plain]


def _calls(marks: Marks, format: ToolFormat, several: bool) -> tuple[str, str]:
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


def _tools(marks: Marks, format: ToolFormat, tools: Sequence[Tool], *, is_forced: bool) -> list[str]:
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
        arguments = json.dumps({"type": "object", **followable(schema), "x-guidance": SPACING})
        rules += [f"tool_{index}: {call}", f"arguments_{index}: %json {arguments}"]
    return rules


def _literal(text: str) -> str:
    return json.dumps(text)
