"""The parts of an answer's text: reasoning, content, and tool calls."""

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
