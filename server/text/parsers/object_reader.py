"""Read a tool call that is written as a JSON object, in text that arrives in pieces."""

import re
from collections.abc import Collection
from typing import Any

import msgspec

from server.text.parsers.answer_parts import AnswerPart, HeldText, JSONScanner, PartKind, PieceReader, Progress

MAX_FIRST_KEY_CHARS = 256  # of an object up to the end of its first key

_NAME = r"[a-zA-Z0-9_-]{1,128}"
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"]*)"|[^"\s])')
_NAME_KEYS = ("name", "tool_name")
_ARGUMENTS_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id", "tool_call_id", None)  # that may be first; None: the object has no key
_OTHER_MEMBERS = r'(?:"(?:type|id|tool_call_id)"\s*:\s*"[^"\\]{0,64}"\s*,\s*){0,3}'


class ObjectCallReader(PieceReader):
    """Reads a call from the opening brace of its object on.

    It is a call from the opening brace of its arguments on. If the arguments do not follow the name, the reader waits
    for the end of the object. Members after the arguments are ignored.
    """

    def __init__(self, name_key: str, arguments_key: str, names: Collection[str]) -> None:
        """`names` are the names of the tools."""
        super().__init__(self._first_key)
        self.parts: list[AnswerPart] = []
        self.is_open = False
        self.rejected = ""
        self._names = names
        self._name_keys = tuple(dict.fromkeys((*_NAME_KEYS, name_key)))
        self._arguments_keys = tuple(dict.fromkeys((*_ARGUMENTS_KEYS, arguments_key)))
        name, arguments = ("|".join(map(re.escape, keys)) for keys in (self._name_keys, self._arguments_keys))
        self._header = re.compile(
            rf'\{{\s*{_OTHER_MEMBERS}"(?:{name})"\s*:\s*"({_NAME})"\s*,\s*"(?:{arguments})"\s*:\s*\{{'
        )
        self._arguments_first = re.compile(rf'\{{\s*{_OTHER_MEMBERS}"(?:{arguments})"\s*:\s*\{{')
        self._scanner = JSONScanner()
        self._object = HeldText()
        self._progress: Progress | None = None

    @property
    def held(self) -> str:
        return "" if self.is_open else "".join([*self._object, self.unread])

    @property
    def num_held(self) -> int:
        return self._object.num_chars + len(self.unread)

    def push(self, text: str) -> Progress:
        self._run(text)
        return self._progress or Progress.MORE

    # The states; each returns whether it can go on, see `PieceReader`.

    def _first_key(self) -> bool:
        """Read the first key, which often shows that the object is not a call."""
        key = _FIRST_KEY.match(self.unread)
        if key is None and len(self.unread) <= MAX_FIRST_KEY_CHARS:
            return False
        known = (*self._name_keys, *self._arguments_keys, *_OTHER_KEYS)
        if key is not None and key.end() <= MAX_FIRST_KEY_CHARS and key[1] not in known:
            self._object.append(self._read(key.end()))
            return self._fail()
        self._state = self._read_header
        return True

    def _read_header(self) -> bool:
        """Read the object up to its arguments, or to its end."""
        if not self._hold(0, 2):
            return False
        text = "".join(self._object)
        if self._scanner.depth == 0:
            return self._decide(text)
        header = self._header.fullmatch(text)
        if header is not None and header[1] in self._names:
            self._begin_call(header[1])
            self.parts.append(AnswerPart(PartKind.ARGUMENTS, "{"))
            self._state = self._read_arguments
        elif self._arguments_first.fullmatch(text):
            self._state = self._whole_object
        else:
            return self._fail()
        return True

    def _whole_object(self) -> bool:
        return self._hold(0) and self._decide("".join(self._object))

    def _read_arguments(self) -> bool:
        end = self._scanner.advance(self.unread, 1)
        text = self._read(len(self.unread) if end is None else end)
        if text:
            self.parts.append(AnswerPart(PartKind.ARGUMENTS, text))
        if end is None:
            return False
        self.is_open = False
        self._state = self._tail
        return True

    def _tail(self) -> bool:
        """Read the end of the object, which models may omit, or find further members."""
        space = len(self.unread) - len(self.unread.lstrip())
        self._object.append(self._read(space))
        char = self.unread[:1]
        if char == "":
            return False
        if char == ",":
            self._state = self._other_members
            return True
        if char == "}":
            self._read(1)
        return self._finish()

    def _other_members(self) -> bool:
        return self._hold(0) and self._finish()

    # Helpers of the states.

    def _hold(self, *depths: int) -> bool:
        """Read the object until its brackets are nested to one of `depths`; return whether that was reached."""
        end = self._scanner.advance(self.unread, *depths)
        self._object.append(self._read(len(self.unread) if end is None else end))
        return end is not None

    def _begin_call(self, name: str) -> None:
        self._object.clear()
        self.parts.append(AnswerPart(PartKind.CALL, name))
        self.is_open = True

    def _decide(self, text: str) -> bool:
        """Emit a whole object as a call, unless it is not one."""
        call = self._read_call(text)
        if call is None or call[0] not in self._names:
            return self._fail()
        self._begin_call(call[0])
        self.parts.append(AnswerPart(PartKind.ARGUMENTS, call[1]))
        self.is_open = False
        return self._finish()

    def _read_call(self, text: str) -> tuple[str, str] | None:
        """Return the name and the arguments of a call written as one JSON object, or None if it is not a call.

        Arguments may be missing or null, or a string that contains JSON, as in OpenAI's answers.
        """
        try:
            members = msgspec.json.decode(text.encode(), type=dict[str, msgspec.Raw])
            name: Any = msgspec.json.decode(_first_of(members, self._name_keys) or b"null")
            arguments = _first_of(members, self._arguments_keys).decode()
            if arguments.startswith('"'):
                arguments = msgspec.json.decode(arguments)
            if arguments in ("", "null"):
                arguments = "{}"
            msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
        except (ValueError, RecursionError):  # msgspec's errors and those about lone surrogates are ValueErrors
            return None
        return (name, arguments) if isinstance(name, str) else None

    def _finish(self) -> bool:
        self._object.clear()
        self._progress = Progress.DONE
        return False

    def _fail(self) -> bool:
        self.rejected = "".join(self._object)
        self._object.clear()
        self._progress = Progress.FAILED
        return False


def _first_of(members: dict[str, msgspec.Raw], keys: tuple[str, ...]) -> bytes:
    """Return the value of the first of the keys that has one, as JSON; b"" if none has."""
    return next((bytes(members[key]) for key in keys if key in members), b"")
