"""The parts of an answer's text: reasoning, content, and tool calls."""

from collections.abc import Iterator
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
