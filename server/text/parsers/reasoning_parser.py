"""Separate a model's reasoning from the content of its answer, in text that arrives in pieces.

Models write their reasoning between two tags at the start of the text. Some templates write the first tag themselves,
at the end of the prompt. Line breaks next to the tags are layout; everything else is returned unchanged.
"""

from dataclasses import dataclass
from enum import Enum, auto

from server.text.parsers.markers import Markers

MAX_SPACE = 64  # characters of white space before the first tag, and line breaks before the second


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


class _State(Enum):
    BEFORE = auto()
    INSIDE = auto()
    LINE_BREAKS = auto()  # after the second tag
    AFTER = auto()


class ReasoningParser:
    """Splits text into reasoning and content."""

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
    def is_holding(self) -> bool:
        """True if text is held back because its part is not determined yet."""
        return bool(self._held)

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
