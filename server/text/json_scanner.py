"""Where a JSON value ends in text that arrives in pieces."""

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')  # of a string


class JSONScanner:
    """Counts brackets, but for those in strings. It does not check anything else."""

    def __init__(self) -> None:
        self.depth = 0  # brackets that are open
        self._in_string = False
        self._is_escaped = False

    def advance(self, text: str, *depths: int) -> int | None:
        """Read on up to the bracket that makes the depth one of `depths`.

        Returns the index after it, or None if all of the text has been read.
        """
        position = 0
        while position < len(text):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, position)
            if match is None:
                return None
            position = match.end()
            if self._read(match[0]) and self.depth in depths:
                return position
        return None

    def _read(self, char: str) -> bool:
        """Whether the character is a bracket."""
        if char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = not self._in_string
        else:
            self.depth += 1 if char in "{[" else -1
            return True
        return False
