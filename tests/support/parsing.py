"""Answers that arrive in pieces, and what parsers make of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, AnyStr, Protocol

from server.text.parsers.answer_parts import AnswerPart, PartKind


class Parser(Protocol):
    def push(self, text: str) -> list[AnswerPart]: ...
    def finish(self) -> list[AnswerPart]: ...


def cut(text: AnyStr, cuts: list[int]) -> list[AnyStr]:
    """Cut a text, or bytes, at positions, which may repeat or be beyond its end."""
    ends = [0, *sorted(min(end, len(text)) for end in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(ends)]


def joined_parts(parser: Parser, pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Return the parts of an answer, with adjacent parts of the same kind joined."""
    found: list[tuple[str, str]] = []
    for kind, text in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        assert text
        if found and found[-1][0] == kind and kind is not PartKind.CALL:
            found[-1] = (kind.value, found[-1][1] + text)
        else:
            found.append((kind.value, text))
    return found


@dataclass
class Answer:
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # names and arguments
    reasoning: str = ""
    is_complete: bool = True  # the last call, or none is

    @property
    def decoded(self) -> list[tuple[str, Any]]:
        """The calls with their arguments as values."""
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def read_answer(parser: Parser, pieces: Sequence[str]) -> Answer:
    """Return all parts of an answer by their kind."""
    parts = joined_parts(parser, pieces)
    of_kind = {kind: [text for each, text in parts if each == kind] for kind in PartKind}
    calls = list(zip(of_kind[PartKind.CALL], of_kind[PartKind.ARGUMENTS], strict=True))
    return Answer("".join(of_kind[PartKind.CONTENT]), calls, "".join(of_kind[PartKind.REASONING]))
