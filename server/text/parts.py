"""What the text of an answer is made of."""

from enum import StrEnum
from typing import NamedTuple


class PartKind(StrEnum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"  # begins the call of a tool; the text is its name
    ARGUMENTS = "arguments"  # of the call that was begun last: a piece of a JSON object


class Part(NamedTuple):
    kind: PartKind
    text: str
