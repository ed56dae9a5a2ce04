"""Match the text before the arguments of a tool call, or before one of them, in text that arrives in pieces."""

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise

from server.text.parsers.tool_formats import ID, INDEX, KEY, NAME, SLOTS, split_text

MAX_HEAD_CHARS = 512
MAX_KEYS = 4096  # names of an object's members that are looked at

_SLOT_PATTERNS = {
    NAME: re.compile(r"[a-zA-Z0-9_.-]{1,128}"),
    ID: re.compile(r"[a-zA-Z0-9_.:-]{1,128}"),
    INDEX: re.compile(r"[0-9]{1,9}"),
    KEY: re.compile(r"""[^<>"'=:,(){}\s/][^<>"\n=]{0,127}"""),
}
_USUAL_KEY = re.compile(r"[\w.-]{1,128}")


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


class KeyNames:
    """The names of an object's members by its schema that have unusual characters. All others are found without it."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        unusual = [name for name in islice(names, MAX_KEYS) if not _USUAL_KEY.fullmatch(name)]
        short = {name.strip(): name for name in unusual if len(name) <= MAX_HEAD_CHARS}
        self._names = {text.replace('"', "&quot;"): name for text, name in short.items()} | short  # as Kimi K3 writes
        self._sorted = sorted(self._names)

    def find(self, text: str, after: str) -> HeadMatch | None:
        """Return the longest unusual name with which a text begins, if `after` follows. The match ends before it."""
        if not self._names:
            return None
        text = text[: 2 * MAX_HEAD_CHARS]
        if len(text) < 2 * MAX_HEAD_CHARS and self._may_go_on(text, after):
            return UNDECIDED
        found, position = None, text.find(after)
        while 0 <= position <= MAX_HEAD_CHARS:
            if (name := self._names.get(text[:position].rstrip())) is not None:
                found = HeadMatch(position, {KEY: name})
            position = text.find(after, position + 1)
        return found

    def _may_go_on(self, text: str, after: str) -> bool:
        """Return whether more text may complete a name or what follows it."""
        index = bisect_left(self._sorted, text)
        if index < len(self._sorted) and self._sorted[index].startswith(text):
            return True
        begun = [text[: len(text) - length] for length in range(len(after)) if text.endswith(after[:length])]
        return any(name.rstrip() in self._names for name in begun)


class Head:
    """A sequence of literal texts and slots. White space may stand between them, except where the text needs none."""

    def __init__(self, text: str, keys: KeyNames | None = None) -> None:
        """`keys` are names for the slot KEY beside usual ones."""
        self._parts = split_text(text)
        self._keys = keys or KeyNames()

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

    def _slot(self, part: str, text: str, after: str) -> HeadMatch | None:
        """Match a slot at the beginning of a text. `after` is the part that follows it."""
        if part == KEY and (known := self._keys.find(text, after)) is not None:
            return known
        found = _SLOT_PATTERNS[part].match(text)
        if found is None:
            return None if text else UNDECIDED
        return UNDECIDED if found.end() == len(text) else HeadMatch(found.end(), {part: found[0].rstrip()})
