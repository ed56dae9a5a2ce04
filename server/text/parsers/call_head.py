"""Match the text before the arguments of a tool call, in text that arrives in pieces."""

import re
from dataclasses import dataclass, field

from server.text.parsers.tool_formats import ID, INDEX, KEY, NAME, SLOTS, split_text

MAX_HEAD_CHARS = 512

_SLOT_PATTERNS = {
    NAME: re.compile(r"[a-zA-Z0-9_.-]{1,128}"),
    ID: re.compile(r"[a-zA-Z0-9_.:-]{1,128}"),
    INDEX: re.compile(r"[0-9]{1,9}"),
    KEY: re.compile(r"""[^<>"'=:,(){}\s/][^<>"\n=]{0,127}"""),
}


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
        position, slots = 0, {}
        for part in self._parts:
            position += len(text[position:]) - len(text[position:].lstrip())
            rest = text[position:]
            if SLOTS.match(part):
                slot = _SLOT_PATTERNS[part].match(rest)
                if slot is None and rest:
                    return None
                if slot is None or slot.end() == len(rest):
                    return UNDECIDED
                slots[part] = slot[0].rstrip()
                position += slot.end()
            elif rest.startswith(part):
                position += len(part)
            else:
                return UNDECIDED if part.startswith(rest) else None
        return HeadMatch(position, slots)
