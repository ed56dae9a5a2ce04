"""Split a model's answer into reasoning, content and tool calls in one pass, as its text arrives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any, Protocol

import msgspec

from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.markers import Markers, MarkerWriter
from server.text.parsers.tool_formats import GENERIC, Schema, ToolFormat
from server.text.parsers.tool_parser import ToolParser

MAX_SPACE = 64  # characters of white space before the first tag of reasoning, and line breaks before the second


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    start: str
    end: str

    def are_opened_by(self, prompt_end: str) -> bool:
        """Return whether a prompt with this end opens the reasoning, so that the answer starts inside it."""
        return prompt_end.rstrip().endswith(self.start)

    def are_open_in(self, text: str) -> bool:
        """Return whether a text, which the model will continue, ends inside its reasoning."""
        return text.rfind(self.start) > text.rfind(self.end)


class AnswerFormat(msgspec.Struct, frozen=True, tag=True, dict=True):
    """The parts that the answers to a request can have, and how the model writes them."""

    tool_format: ToolFormat = GENERIC
    tools: Mapping[str, Schema] = {}  # schemas of arguments; without tools, calls are content
    parallel_calls: bool = True
    reasoning_tags: ReasoningTags | None = None  # None: reasoning is content
    content_markers: tuple[str, ...] = ()  # texts around the content, which are not part of it
    is_reasoning: bool = False  # the prompt ends inside the reasoning
    calls_end: str = "tool_calls"  # finish reason of an answer that ends with calls

    @property
    def is_plain(self) -> bool:
        """True if all of the text is content."""
        return not self.markers

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that delimit the parts. Control tokens in them must be kept in the text for the parser."""
        tool_markers = self.tool_format.texts if self.tools else ()
        tags = (self.reasoning_tags.start, self.reasoning_tags.end) if self.reasoning_tags is not None else ()
        return (*tags, *tool_markers, *self.content_markers)

    @cached_property
    def argument_schemas(self) -> Mapping[str, Any]:
        """The schemas of the tools' arguments as the syntax needs them, shared by all choices."""
        return {name: self.tool_format.arguments.prepare(schema) for name, schema in self.tools.items()}

    def answer_rules(
        self, markers: MarkerWriter, names: Sequence[str], *, is_forced: bool, has_content_grammar: bool
    ) -> list[str] | None:
        """Return the rules of answers in which a call is required, or the content has a grammar, or calls are strict.

        `names` are those of the tools, whose arguments are the rules `args_0` and so on. None: answers are
        reasoning, calls and content.
        """
        return None

    def new_parser(self, *, hidden: Sequence[str] = ()) -> "Parser":
        """Return a parser for one answer. `hidden` are markers to remove from content."""
        return AnswerParser(self, hidden=hidden)


class Parser(Protocol):
    """Splits the text of one choice into its parts as it arrives; `AnswerParser` says what its members are."""

    @property
    def format(self) -> AnswerFormat: ...
    @property
    def is_reasoning(self) -> bool: ...
    @property
    def num_held(self) -> int: ...
    @property
    def ends_with_calls(self) -> bool: ...
    def push(self, text: str) -> list[AnswerPart]: ...
    def finish(self) -> list[AnswerPart]: ...


class _State(Enum):
    BEFORE = auto()
    INSIDE = auto()
    LINE_BREAKS = auto()  # after the second tag
    AFTER = auto()


class ReasoningParser:
    """Splits text into reasoning and content.

    Models write their reasoning between two tags at the start of the text. Some templates write the first tag
    themselves, at the end of the prompt. Line breaks next to the tags are layout; all else is returned unchanged.
    """

    def __init__(self, tags: ReasoningTags, *, is_open: bool = False) -> None:
        """`is_open` means that the prompt ends with the first tag."""
        self._tags = tags
        self._end = Markers([tags.end])
        self._state = _State.INSIDE if is_open else _State.BEFORE
        self._is_first = True  # no reasoning has been returned yet
        self._held = ""

    @property
    def is_inside(self) -> bool:
        return self._state is _State.INSIDE

    @property
    def num_held(self) -> int:
        """Number of characters held back."""
        return len(self._held)

    def push(self, text: str) -> tuple[str, str]:
        """Read the next piece of text; return the reasoning and the content that it completes."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state is _State.BEFORE:
            text = self._read_start_tag(text)
        if self._state is _State.INSIDE:
            reasoning, text = self._read_reasoning(text)
        if self._state is _State.LINE_BREAKS:
            text = text.lstrip("\n")
            if text:
                self._state = _State.AFTER
        return reasoning, text

    def finish(self) -> tuple[str, str]:
        """Return the reasoning and the content that were held back. Call it after the last piece of text."""
        held, self._held = self._held, ""
        return (held, "") if self.is_inside else ("", held)

    def _read_start_tag(self, text: str) -> str:
        """Return the text after the first tag, all text if there is no tag, or "" if that is undecided."""
        stripped = text.lstrip()
        if len(text) - len(stripped) <= MAX_SPACE:
            if stripped.startswith(self._tags.start):
                self._state = _State.INSIDE
                return stripped.removeprefix(self._tags.start)
            if stripped.startswith(self._tags.end):  # models write it alone if they do not reason
                self._state = _State.LINE_BREAKS
                return stripped.removeprefix(self._tags.end)
            if self._tags.start.startswith(stripped) or self._tags.end.startswith(stripped):
                self._held = text
                return ""
        self._state = _State.AFTER
        return text

    def _read_reasoning(self, text: str) -> tuple[str, str]:
        """Return the reasoning, and the text after the second tag."""
        if self._is_first:
            text = text.lstrip("\n")
        match = self._end.find(text)
        if match is not None:
            self._state = _State.LINE_BREAKS
            return _without_last_breaks(text[: match.start()]), text[match.end() :]
        reasoning = _without_last_breaks(text[: len(text) - self._end.num_partial(text)])
        self._held = text[len(reasoning) :]
        self._is_first = self._is_first and not reasoning
        return reasoning, ""


def _without_last_breaks(text: str) -> str:
    """Return a text without the line breaks at its end, of which it removes no more than `MAX_SPACE`."""
    return text[: max(len(text.rstrip("\n")), len(text) - MAX_SPACE)]


class AnswerParser:
    """Splits the text of one choice into its parts as it arrives."""

    def __init__(self, format: AnswerFormat, *, hidden: Sequence[str] = ()) -> None:
        """`hidden` are markers to remove from content."""
        self.format = format
        self._reasoning: ReasoningParser | None = None
        if format.reasoning_tags is not None:
            self._reasoning = ReasoningParser(format.reasoning_tags, is_open=format.is_reasoning)
        self._tools = ToolParser(
            format.tool_format, format.argument_schemas, parallel=format.parallel_calls, hidden=hidden
        )

    @property
    def is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def num_held(self) -> int:
        """Number of characters held back because their part is not determined yet."""
        return self._tools.num_held + (0 if self._reasoning is None else self._reasoning.num_held)

    @property
    def ends_with_calls(self) -> bool:
        """True if the client should call tools: there are calls, and all are complete."""
        return self._tools.num_calls > 0 and self._tools.is_complete

    def push(self, text: str) -> list[AnswerPart]:
        """Read the next piece of text; return the parts that it completes."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text)
        return _reasoning_part(reasoning) + self._tools.push(content)

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. Call it after the last piece of text."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.finish()
        return _reasoning_part(reasoning) + self._tools.push(content) + self._tools.finish()


def _reasoning_part(text: str) -> list[AnswerPart]:
    return [AnswerPart(PartKind.REASONING, text)] if text else []
