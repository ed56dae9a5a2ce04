"""What a model adds to its answer, as the writers of answers get it."""

from typing import Any

from server.generation.choice_state import Addition, Delta
from server.text.parts import Part, PartKind


def content(text: str) -> Part:
    return Part(PartKind.CONTENT, text)


def thought(text: str) -> Part:
    return Part(PartKind.REASONING, text)


def delta(*parts: Addition, **fields: Any) -> Delta:
    """To a request's only choice."""
    return Delta(0, list(parts), **fields)
