"""Read one tool call in an answer that arrives in pieces: the protocol, and calls that begin with the tool's name."""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol

from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.call_head import UNDECIDED, Head
from server.text.parsers.json_scanner import JSONScanner
from server.text.parsers.tool_formats import NAME

MAX_SPACE = 256  # characters of white space between a tool's name and its arguments


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


class ArgumentsReader(Protocol):
    """Converts the text of a call's arguments to JSON.

    Attributes:
        unread: the text that is not converted yet, or the text after the arguments.
    """

    unread: str

    def begins_with(self, text: str) -> bool | None:
        """Return whether arguments may begin with this text, or None if that needs more text."""
        ...

    def push(self, text: str) -> tuple[str, bool]:
        """Return the JSON that the text adds, and whether the arguments are complete."""
        ...


class JSONArgumentsReader:
    """Passes the text of a JSON object on."""

    def __init__(self) -> None:
        self.unread = ""
        self._scanner = JSONScanner()

    def begins_with(self, text: str) -> bool | None:
        text = text.lstrip()
        return text[0] == "{" if text else None

    def push(self, text: str) -> tuple[str, bool]:
        text = text if self._scanner.depth else text.lstrip()
        end = self._scanner.advance(text, 0)
        self.unread = "" if end is None else text[end:]
        return text[:end], end is not None


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
