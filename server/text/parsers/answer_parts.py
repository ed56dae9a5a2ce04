"""The parts of an answer: reasoning, content, and tool calls; and readers of text that arrives in pieces."""

import re
from collections.abc import Callable, Iterator
from enum import Enum, StrEnum, auto
from typing import NamedTuple, Protocol

_OUTSIDE_STRING = re.compile(r'["{}\[\]]')
_INSIDE_STRING = re.compile(r'["\\]')


class PartKind(StrEnum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"  # starts a tool call; the text is the tool's name
    ARGUMENTS = "arguments"  # a piece of the JSON arguments of the last call


class AnswerPart(NamedTuple):
    kind: PartKind
    text: str


class PieceReader:
    """A state machine that reads text that arrives in pieces.

    Each state is a method that reads from `unread`. It returns True to run the next state, and False if it needs more
    text, or if all has been read.
    """

    def __init__(self, state: Callable[[], bool]) -> None:
        self.unread = ""
        self._state = state

    def _run(self, text: str) -> None:
        """Run the states on more text."""
        self.unread += text
        while self._state():
            pass

    def _read(self, num_chars: int) -> str:
        """Remove characters from the unread text and return them."""
        text, self.unread = self.unread[:num_chars], self.unread[num_chars:]
        return text

    def _skip_space(self) -> str:
        """Remove white space; return the character after it, or "" if it has not arrived yet."""
        self.unread = self.unread.lstrip()
        return self.unread[:1]


class HeldText:
    """Pieces of text that a parser has not decided about yet, and their length, which is needed after each token."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def append(self, text: str) -> None:
        self._pieces.append(text)
        self.num_chars += len(text)

    def clear(self) -> None:
        self._pieces.clear()
        self.num_chars = 0


class JSONScanner:
    """Counts the open brackets outside of strings. It does not check the JSON otherwise."""

    def __init__(self) -> None:
        self.depth = 0  # number of open brackets
        self._in_string = False
        self._is_escaped = False

    def advance(self, text: str, *depths: int) -> int | None:
        """Read up to the bracket that makes the depth one of `depths`.

        Returns the index after that bracket, or None if it has read all of the text.
        """
        position = 0
        while position < len(text):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            match = (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(text, position)
            if match is None:
                return None
            position = match.end()
            if self._read(match[0]) and self.depth in depths:
                return position
        return None

    def _read(self, char: str) -> bool:
        """Update the state for a character; return whether it is a bracket."""
        if char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = not self._in_string
        else:
            self.depth += 1 if char in "{[" else -1
            return True
        return False


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
