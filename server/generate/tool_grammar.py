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

    Args:
        tools: those of the request, judged.
        parallel: whether several calls may follow one another. A tool that is named is called once.
        think_tags: of a model that may think before it answers, or does so (`is_thinking`: the prompt has begun it).
        special_ids: tags and markers that are control tokens, which no text spells -> their token ids.
        has_content_grammar: what is said without calls must match a grammar `@content`, which is to be put beside it.
    """
    allowed = callable_tools(tools, tool_choice)
    is_forced = must_call(tool_choice)
    if not is_forced and not has_content_grammar and not any(tool.function.strict for tool in allowed):
        return None
    marks = _Marks(special_ids or {})
    no_thoughts = "" if think_tags is None or is_thinking else marks.without(think_tags.start)
    rules = [
        "%llguidance {}",
        *_thoughts(marks, think_tags, is_thinking),
        f"FIRST: TEXT{no_thoughts}",
        f"TEXT: /{ANYTHING}/",
    ]
    if not allowed:
        return "\n".join([*rules, "answer: @content"]) + "\n"
    several = parallel and not isinstance(tool_choice, NamedTool)
    rules += [
        *_answer(marks, format, is_forced, several, has_content_grammar),
        f"tool: {' | '.join(f'tool_{index}' for index in range(len(allowed)))}",
        *(_tool(marks, format, index, tool) for index, tool in enumerate(allowed)),
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


def _answer(marks: _Marks, format: ToolFormat, is_forced: bool, several: bool, has_content_grammar: bool) -> list[str]:
    """The rule `answer`: calls, or text that may end with calls."""
    start, calls = _calls(marks, format, several)
    if is_forced:
        return [f"answer: {start} {calls}"]
    if has_content_grammar:
        return [f"answer: {start} {calls} | @content"]
    if start:
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


def _tool(marks: _Marks, format: ToolFormat, index: int, tool: Tool) -> str:
    """The rules of one tool: its name, and its arguments."""
    if format.has_names and not format.has_arrays:
        call = f"{_literal(tool.name)} {marks.write(format.name_end)} arguments_{index}"
    else:
        head = f'{{"name": "{tool.name}", "{format.arguments_key}": '
        call = f'{_literal(head)} arguments_{index} "}}"'
    schema = {"type": "object", **(tool.function.parameters or NO_ARGUMENTS), "x-guidance": SPACING}
    return f"tool_{index}: {call}\narguments_{index}: %json {json.dumps(schema)}"


def _literal(text: str) -> str:
    return json.dumps(text)
