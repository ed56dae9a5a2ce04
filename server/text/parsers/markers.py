"""Find markers, such as tags, in text that arrives in pieces, and write them as expressions of llguidance's Lark."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANYTHING = r"(.|\n)*"


class Markers:
    """A set of markers to search for."""

    def __init__(self, markers: Sequence[str]) -> None:
        longest_first = sorted(markers, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        prefixes = {marker[:length] for marker in markers for length in range(1, len(marker))}
        self._prefixes = sorted(prefixes, key=len, reverse=True)

    def find(self, text: str) -> re.Match[str] | None:
        """Return the first marker in the text."""
        return self._pattern.search(text)

    def find_decided(self, text: str) -> re.Match[str] | None:
        """Return the first marker in the text, or None if the text that follows may make it a longer one."""
        match = self._pattern.search(text)
        return None if match is not None and text[match.start() :] in self._prefixes else match

    def num_partial(self, text: str) -> int:
        """Return how many characters at the end of a text without markers could be the start of one."""
        return next((len(prefix) for prefix in self._prefixes if text.endswith(prefix)), 0)

    def remove(self, text: str) -> str:
        return self._pattern.sub("", text)


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


def escape_regex(text: str) -> str:
    """Return a regular expression that matches the text alone, also between slashes."""
    return re.sub(r"\W", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
