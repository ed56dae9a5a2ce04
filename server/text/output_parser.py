"""The parts of an answer: what the model thinks, what it says, and which tools it calls, told apart in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.text.parts import Part, PartKind
from server.text.reasoning import ReasoningParser, ThinkTags
from server.text.tool_formats import GENERIC, ToolFormat
from server.text.tool_parser import ToolParser


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What may be in the answers to a request besides content."""

    tool_format: ToolFormat = GENERIC
    tool_names: frozenset[str] = field(default_factory=frozenset)  # that may be called; empty: calls are content
    parallel_calls: bool = True
    think_tags: ThinkTags | None = None  # None: thoughts are content
    is_thinking: bool = False  # the prompt has the first of these tags
    calls_end: str = "tool_calls"  # the finish reason of an answer that ends with calls

    @property
    def is_plain(self) -> bool:
        """All of the text is content."""
        return not self.markers

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts, some of them control tokens, that have to be seen to tell the parts apart."""
        of_tools = self.tool_format.markers if self.tool_names else ()
        of_thoughts = (self.think_tags.start, self.think_tags.end) if self.think_tags is not None else ()
        return (*of_thoughts, *of_tools)


class OutputParser:
    """Splits the text of one choice into its parts."""

    def __init__(self, format: OutputFormat, *, hidden: Sequence[str] = ()) -> None:
        """`hidden` are markers that never are content."""
        self.format = format
        self._reasoning: ReasoningParser | None = None
        if format.think_tags is not None:
            self._reasoning = ReasoningParser(format.think_tags, is_open=format.is_thinking)
        self._tools = ToolParser(format.tool_format, format.tool_names, parallel=format.parallel_calls, hidden=hidden)

    @property
    def is_thinking(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def is_holding(self) -> bool:
        """Whether there is text of which it is not known yet what it is."""
        return self._tools.is_holding or (self._reasoning is not None and self._reasoning.is_holding)

    @property
    def num_held(self) -> int:
        """Characters of that text."""
        return self._tools.num_held + (0 if self._reasoning is None else self._reasoning.num_held)

    @property
    def ends_with_calls(self) -> bool:
        """Whether tools are to be called now: there are calls, and none is broken off."""
        return self._tools.num_calls > 0 and self._tools.is_complete

    def push(self, text: str) -> list[Part]:
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text)
        return _reasoning_part(reasoning) + self._tools.push(content)

    def finish(self) -> list[Part]:
        """The rest; call it when no more text comes."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.finish()
        return _reasoning_part(reasoning) + self._tools.push(content) + self._tools.finish()


def _reasoning_part(text: str) -> list[Part]:
    return [Part(PartKind.REASONING, text)] if text else []
