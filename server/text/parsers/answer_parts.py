"""The parts of an answer: reasoning, content, and tool calls; and readers of text that arrives in pieces."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple


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
