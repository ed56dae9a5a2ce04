"""The tags between which models write what is no content."""

import re
from collections.abc import Sequence


class Markers:
    """Finds some short texts in text that arrives in pieces."""

    def __init__(self, markers: Sequence[str]) -> None:
        longest_first = sorted(markers, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        beginnings = {marker[:length] for marker in markers for length in range(1, len(marker))}
        self._beginnings = sorted(beginnings, key=len, reverse=True)

    def find(self, text: str) -> re.Match[str] | None:
        """The first one."""
        return self._pattern.search(text)

    def num_begun(self, text: str) -> int:
        """How many characters at the end of a text without markers may be the beginning of one."""
        return next((len(beginning) for beginning in self._beginnings if text.endswith(beginning)), 0)

    def remove(self, text: str) -> str:
        return self._pattern.sub("", text)
