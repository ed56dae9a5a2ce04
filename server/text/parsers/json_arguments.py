"""Read the arguments of a tool call, which arrive in pieces: the protocol, and arguments that are a JSON object."""

import re
from typing import Protocol

_OUTSIDE_STRING = re.compile(r'["{}\[\]]')
_INSIDE_STRING = re.compile(r'["\\]')


class ArgumentsReader(Protocol):
    """Converts the text of a call's arguments to JSON.

    Attributes:
        unread: the text that is not converted yet, or the text after the arguments.
    """

    unread: str

    def begins_with(self, text: str) -> bool | None:
        """Return whether arguments may begin with this text, or None if that needs more text."""
        return True

    def push(self, text: str) -> tuple[str, bool]:
        """Return the JSON that the text adds, and whether the arguments are complete."""
        ...


class JSONArgumentsReader:
    """Passes the text of a JSON object on."""

    def __init__(self) -> None:
        self.unread = ""
        self._scanner = JSONScanner()

    def begins_with(self, text: str) -> bool | None:
        text = text.lstrip()
        return text[0] == "{" if text else None

    def push(self, text: str) -> tuple[str, bool]:
        text = text if self._scanner.depth else text.lstrip()
        end = self._scanner.advance(text, 0)
        self.unread = "" if end is None else text[end:]
        return text[:end], end is not None


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
