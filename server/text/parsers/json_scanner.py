"""Find the end of a JSON value in text that arrives in pieces."""

import re

_OUTSIDE_STRING = re.compile(r'["{}\[\]]')
_INSIDE_STRING = re.compile(r'["\\]')


class JSONScanner:
    """Counts the open brackets outside of strings. It does not check the JSON otherwise."""

    def __init__(self) -> None:
        self.depth = 0  # number of open brackets
        self._in_string = False
        self._is_escaped = False

    def advance(self, text: str, *depths: int) -> int | None:
        """Read up to the bracket that makes the depth one of `depths`.

        Returns the index after that bracket, or None if it has read all of the text.
        """
        position = 0
        while position < len(text):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            match = (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(text, position)
            if match is None:
                return None
            position = match.end()
            if self._read(match[0]) and self.depth in depths:
                return position
        return None

    def _read(self, char: str) -> bool:
        """Update the state for a character; return whether it is a bracket."""
        if char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = not self._in_string
        else:
            self.depth += 1 if char in "{[" else -1
            return True
        return False
