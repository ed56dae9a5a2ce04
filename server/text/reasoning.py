"""What a model thinks before it answers, apart from its answer, in text that arrives in pieces.

Models think between two tags at the beginning of the text. Some templates write the first tag themselves, at the end of
the prompt. Line breaks next to the tags are layout; everything else is reasoning or content as it stands.
"""

from dataclasses import dataclass
from enum import Enum, auto

from server.text.markers import Markers

MAX_SPACE = 64  # characters of white space before the first tag


@dataclass(frozen=True, slots=True)
class ThinkTags:
    start: str
    end: str

    def are_opened_by(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so has begun the thoughts that are to come."""
        return prompt_end.rstrip().endswith(self.start)

    def are_open_in(self, text: str) -> bool:
        """Whether a text that is to be continued breaks off within thoughts."""
        return text.rfind(self.start) > text.rfind(self.end)


_KNOWN_TAGS = (ThinkTags("<think>", "</think>"), ThinkTags("[THINK]", "[/THINK]"))


def detect_think_tags(template_source: str) -> ThinkTags | None:
    """The tags that a chat template knows; None: it is not that of a reasoning model."""
    return next((tags for tags in _KNOWN_TAGS if tags.end in template_source), None)


class _State(Enum):
    BEFORE = auto()
    INSIDE = auto()
    BEHIND = auto()  # the line breaks after the thoughts
    AFTER = auto()


class ReasoningParser:
    """Splits text into reasoning and content."""

    def __init__(self, tags: ThinkTags, *, is_open: bool = False) -> None:
        """`is_open`: the prompt ends with the first tag."""
        self._tags = tags
        self._end = Markers([tags.end])
        self._state = _State.INSIDE if is_open else _State.BEFORE
        self._is_first = True  # nothing of the reasoning has been released
        self._held = ""

    @property
    def is_inside(self) -> bool:
        return self._state is _State.INSIDE

    @property
    def is_holding(self) -> bool:
        """Whether there is text of which it is not known yet what it is."""
        return bool(self._held)

    @property
    def num_held(self) -> int:
        """Characters of that text."""
        return len(self._held)

    def push(self, text: str) -> tuple[str, str]:
        """What can be released as reasoning and as content."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state is _State.BEFORE:
            text = self._begin(text)
        if self._state is _State.INSIDE:
            reasoning, text = self._think(text)
        if self._state is _State.BEHIND:
            text = text.lstrip("\n")
            if text:
                self._state = _State.AFTER
        return reasoning, text

    def finish(self) -> tuple[str, str]:
        """The rest; call it when no more text comes."""
        held, self._held = self._held, ""
        return (held, "") if self.is_inside else ("", held)

    def _begin(self, text: str) -> str:
        """The text after the first tag, or all of it if it is not there; "" while that is open."""
        begun = text.lstrip()
        if len(text) - len(begun) <= MAX_SPACE:
            if begun.startswith(self._tags.start):
                self._state = _State.INSIDE
                return begun.removeprefix(self._tags.start)
            if self._tags.start.startswith(begun):
                self._held = text
                return ""
        self._state = _State.AFTER
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """What is reasoning, and what comes after it."""
        if self._is_first:
            text = text.lstrip("\n")
        match = self._end.find(text)
        if match is not None:
            self._state = _State.BEHIND
            return text[: match.start()].rstrip("\n"), text[match.end() :]
        reasoning = text[: len(text) - self._end.num_begun(text)].rstrip("\n")
        self._held = text[len(reasoning) :]
        self._is_first = self._is_first and not reasoning
        return reasoning, ""
