"""Find markers, such as the tags of reasoning and of tool calls, in text that arrives in pieces."""

import re
from collections.abc import Sequence


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
