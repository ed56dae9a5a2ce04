"""Read one tool call in an answer that arrives in pieces: the protocol, and calls that begin with the tool's name."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import pairwise
from typing import Protocol

from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.json_arguments import ArgumentsReader
from server.text.parsers.tool_formats import ID, INDEX, NAME, SLOTS, split_text

MAX_HEAD_CHARS = 512
MAX_SPACE = 256  # characters of white space between a tool's name and its arguments


@dataclass(frozen=True, slots=True)
class HeadMatch:
    """The result of matching a head.

    Attributes:
        end: the index after the head; None if more text is needed.
        slots: the texts of the slots.
    """

    end: int | None
    slots: dict[str, str] = field(default_factory=dict)


UNDECIDED = HeadMatch(None)


class Head:
    """A sequence of literal texts and slots. White space may stand between them, except where the text needs none."""

    slot_patterns: Mapping[str, re.Pattern[str]] = {
        NAME: re.compile(r"[a-zA-Z0-9_.-]{1,128}"),
        ID: re.compile(r"[a-zA-Z0-9_.:-]{1,128}"),
        INDEX: re.compile(r"[0-9]{1,9}"),
    }

    def __init__(self, text: str) -> None:
        self._parts = split_text(text)

    def match(self, text: str) -> HeadMatch | None:
        """Match the beginning of a text; return None if no continuation of it matches.

        A match does not change when more text follows.
        """
        found = self._match(text)
        if found is UNDECIDED and len(text) <= MAX_HEAD_CHARS:
            return found
        return None if found is None or found.end is None or found.end > MAX_HEAD_CHARS else found

    def _match(self, text: str) -> HeadMatch | None:
        position, slots = 0, dict[str, str]()
        for part, after in pairwise([*self._parts, ""]):
            position += len(text[position:]) - len(text[position:].lstrip())
            rest = text[position:]
            if SLOTS.match(part):
                slot = self._slot(part, rest, after)
                if slot is None or slot.end is None:
                    return slot
                slots |= slot.slots
                position += slot.end
            elif rest.startswith(part):
                position += len(part)
            else:
                return UNDECIDED if part.startswith(rest) else None
        return HeadMatch(position, slots)

    def _slot(self, slot: str, text: str, after: str) -> HeadMatch | None:
        """Match a slot at the beginning of a text. `after` is the part that follows it."""
        found = self.slot_patterns[slot].match(text)
        if found is None:
            return None if text else UNDECIDED
        return UNDECIDED if found.end() == len(text) else HeadMatch(found.end(), {slot: found[0].rstrip()})


class Progress(Enum):
    MORE = auto()  # the call needs more text
    DONE = auto()  # the call is complete
    FAILED = auto()  # the text is not, or no longer, a call


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        parts: the parts read so far; the caller takes them away.
        is_open: whether the arguments have begun and not ended.
        unread: the text after a call that is complete, or the text to read otherwise if it is no call.
        rejected: the text before `unread` that becomes content if the text is no call.
    """

    parts: list[AnswerPart]
    is_open: bool
    unread: str
    rejected: str

    @property
    def held(self) -> str:
        """The text that becomes content if the answer ends here."""
        ...

    @property
    def num_held(self) -> int:
        """Number of characters held back."""
        ...

    def push(self, text: str) -> Progress: ...


class NamedCallReader:
    """Reads a call that begins with text and the tool's name, up to the end of its arguments."""

    def __init__(self, heads: Sequence[Head], new_reader: Callable[[str], ArgumentsReader | None]) -> None:
        """Prepare the reader.

        Args:
            heads: the forms of the text up to the arguments.
            new_reader: returns a reader of the arguments of the tool with this name, None if there is no such tool.
        """
        self.parts: list[AnswerPart] = []
        self.is_open = False
        self.unread = ""
        self.rejected = ""
        self._heads = list(heads)
        self._new_reader = new_reader
        self._reader: ArgumentsReader | None = None

    @property
    def held(self) -> str:
        return "" if self._reader is not None else self.unread

    @property
    def num_held(self) -> int:
        return len(self.unread if self._reader is None else self._reader.unread)

    def push(self, text: str) -> Progress:
        if self._reader is None:
            self.unread += text
            progress = self._read_head()
            if progress is not None:
                return progress
            text, self.unread = self.unread, ""
        return self._read_arguments(text)

    def _read_head(self) -> Progress | None:
        """Read the head; return None if it is complete."""
        while self._heads:
            match = self._heads[0].match(self.unread)
            if match is UNDECIDED:
                return Progress.MORE
            if match is not None and match.end is not None:
                rest, reader = self.unread[match.end :], self._new_reader(match.slots[NAME])
                num_spaces = len(rest) - len(rest.lstrip())
                begins = reader is not None and num_spaces <= MAX_SPACE and reader.begins_with(rest)
                if begins is None:
                    return Progress.MORE
                if begins:
                    self.parts.append(AnswerPart(PartKind.CALL, match.slots[NAME]))
                    self._reader, self.unread, self.is_open = reader, rest, True
                    return None
            self._heads.pop(0)
        return Progress.FAILED

    def _read_arguments(self, text: str) -> Progress:
        assert self._reader is not None
        json, is_complete = self._reader.push(text)
        if json:
            self.parts.append(AnswerPart(PartKind.ARGUMENTS, json))
        if not is_complete:
            return Progress.MORE
        self.is_open = False
        self.unread = self._reader.unread
        return Progress.DONE
