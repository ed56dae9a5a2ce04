"""Write tags and markers, which may be special tokens, as expressions of llguidance's dialect of Lark."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.constrained.regex import escape_regex

ANYTHING = r"(.|\n)*"


@dataclass(frozen=True, slots=True)
class MarkerWriter:
    """Writes tags and markers as grammar expressions: special tokens by id, everything else as literal text."""

    special_ids: Mapping[str, int]

    def write(self, marker: str) -> str:
        return " ".join(map(self._write_piece, self._pieces(marker)))

    def up_to(self, rule: str, text: str, marker: str) -> str:
        """Return a rule named `rule` for `text` up to and including the first occurrence of the marker."""
        first, *others = self._pieces(marker)
        if first in self.special_ids:
            return f"{rule}: {text} {self.write(marker)}"
        if not others:
            return f"{rule}[lazy]: {text} {literal(marker)}"
        # The marker begins with plain text, `first`, which ends the text up to the special token after it.
        before = f"{rule.upper()}: {text} {literal(first)}"
        return f"{before}\n{rule}: {rule.upper()} {self.write(marker[len(first) :])}"

    def without(self, marker: str, *, anywhere: bool = False) -> str:
        """Return the part of a terminal that excludes the marker at the beginning of its text, or anywhere in it."""
        if self.has_special(marker):
            return ""
        before = ANYTHING if anywhere else ""
        return f" & ~/{before}{escape_regex(marker)}{ANYTHING}/"

    def has_special(self, marker: str) -> bool:
        """Return whether a marker contains a special token, so that no text is tokenized to it."""
        return any(piece in self.special_ids for piece in self._pieces(marker))

    def _write_piece(self, piece: str) -> str:
        return f"<[{self.special_ids[piece]}]>" if piece in self.special_ids else literal(piece)

    def _pieces(self, marker: str) -> list[str]:
        """Split a marker at its special tokens."""
        if not self.special_ids:
            return [marker]
        tokens = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        return [piece for piece in re.split(f"({tokens})", marker) if piece] or [marker]


def literal(text: str) -> str:
    """Return the expression of a literal text."""
    return json.dumps(text)
