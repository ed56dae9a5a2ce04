"""Calls of tools in an answer that arrives in pieces.

A call is one that names a tool of the request. From the first brace of its arguments on it is a call, and its arguments
are what the model wrote, up to where that brace is closed or the answer ends: so they can be streamed, and an answer
reads the same however it was cut into pieces. Where the arguments do not follow the name, the call is awaited.

Everything else is content, as it stands: text before and after calls, calls of unknown tools, broken ones, and those
that end before their arguments begin. Only white space before the first call, between calls, and after the last one is
layout, like the tags. Each character is looked at once or twice, so time is linear in the length of the text.
"""

import re
from collections.abc import Collection, Sequence

import msgspec

from server.text.json_scanner import JSONScanner
from server.text.markers import Markers
from server.text.parts import Part, PartKind
from server.text.tool_formats import ToolFormat

MAX_HEAD_CHARS = 256  # up to the arguments that follow a bare name, or up to the end of an object's first key

_NAME = r"[a-zA-Z0-9_-]{1,64}"
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"]*)"|[^"\s])')
_KEYS = ("name", "type", "arguments", "parameters", None)  # None: there is no key
# An object up to the brace that begins its arguments.
_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    rf'"name"\s*:\s*"({_NAME})"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{'
)
_ARGUMENTS_FIRST = re.compile(r'\{\s*"(?:arguments|parameters)"\s*:\s*\{')
_NAMED_HEAD = re.compile(rf"\s*({_NAME})\s*(?:\[CALL_ID\][a-zA-Z0-9_-]{{1,64}})?(?:\[ARGS\])?\s*")


class ToolParser:
    """Splits text into content and calls."""

    def __init__(
        self, format: ToolFormat, names: Collection[str], *, parallel: bool = True, hidden: Sequence[str] = ()
    ) -> None:
        """`names` are those of the tools. Without `parallel`, what follows the first call is content.

        `hidden` are markers that are left out of content too: control tokens that the client does not want to see.
        """
        self.num_calls = 0
        self.is_complete = True  # no call is begun and not ended
        self._format = format
        self._names = frozenset(names)
        self._parallel = parallel
        self._hidden = Markers(hidden)
        self._markers = Markers([format.start, *hidden] if names else hidden)
        self._state = self._seek
        self._buffer = ""  # not read yet
        self._held: list[str] = []  # read, but not decided yet: layout, and what opens a call
        self._object: list[str] = []  # after that: an object that may turn out to be a call
        self._scanner = JSONScanner()
        self._outer_depth = 0  # of what is around the arguments that are being read
        self._closers: list[str] = []  # what has to come after the call, the innermost last
        self._is_blank = True  # there was nothing but white space since the start or the last call
        self._parts: list[Part] = []

    @property
    def is_holding(self) -> bool:
        """Whether there is text of which it is not known yet what it is."""
        return bool(self._buffer or self._held or self._object)

    @property
    def num_held(self) -> int:
        """Characters of that text."""
        return sum(map(len, [self._buffer, *self._held, *self._object]))

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        while self._state():
            pass
        return self._take_parts()

    def finish(self) -> list[Part]:
        """The rest; call it when no more text comes."""
        rest = "".join([*self._held, *self._object, self._buffer])
        is_layout = self._state == self._after or rest.strip() in ("", ",", self._format.separator)
        if not (self.num_calls and is_layout):
            self._add(PartKind.CONTENT, self._hidden.remove(rest))
        return self._take_parts()

    # The states. Each reads from the buffer, and says whether the next one can go on with what is left there.

    def _seek(self) -> bool:
        """Content, up to what opens a call."""
        if self._is_blank and self._may_call and self._format.is_bare:
            char = self._skip_space()
            if char == "":
                return False
            if char == "{" or (char == "[" and self._format.has_arrays):
                self._state = self._begin_object
                return True
        match = self._markers.find(self._buffer)
        if match is None:
            self._content(self._read(len(self._buffer) - self._markers.num_begun(self._buffer)))
            return False
        self._content(self._read(match.start()))
        marker = self._read(len(match[0]))
        if marker == self._format.start and self._may_call:
            self._held.append(marker)
            self._closers = [self._format.end] if self._format.end else []
            self._state = self._begin_object
        else:
            self._content(marker)
        return True

    def _begin_object(self) -> bool:
        """The bracket of a call or of an array of calls, or a name."""
        char = self._skip_space()
        if char == "":
            return False
        in_array = self._closers[-1:] == ["]"]
        if char == "{":
            self._scanner = JSONScanner()
            self._state = self._first_key
        elif char == "[" and self._format.has_arrays and not in_array:
            self._held.append(self._read(1))
            self._closers.append("]")
        elif self._format.has_names and not in_array and self._format.start in self._held:
            self._state = self._named_head
        else:
            return self._give_up()
        return True

    def _named_head(self) -> bool:
        """A name, up to the brace of the arguments."""
        end = self._buffer.find("{")
        if end < 0 and len(self._buffer) <= MAX_HEAD_CHARS:
            return False
        head = _NAMED_HEAD.fullmatch(self._buffer[:end]) if 0 < end <= MAX_HEAD_CHARS else None
        if head is None or head[1] not in self._names:
            return self._give_up()
        self._read(end)
        self._scanner = JSONScanner()
        self._begin_call(head[1])
        return True

    def _first_key(self) -> bool:
        """The first key of an object, which often shows that it is no call."""
        key = _FIRST_KEY.match(self._buffer)
        if key is None and len(self._buffer) <= MAX_HEAD_CHARS:
            return False
        if key is not None and key.end() <= MAX_HEAD_CHARS and key[1] not in _KEYS:
            self._object.append(self._read(key.end()))
            return self._give_up()
        self._state = self._header
        return True

    def _header(self) -> bool:
        """An object up to its arguments, or up to its end."""
        if not self._hold_object(0, 2):
            return False
        text = "".join(self._object)
        if self._scanner.depth == 0:
            return self._decide(text)
        header = _HEADER.fullmatch(text)
        if header is not None and header[1] in self._names:
            self._begin_call(header[1])
            self._add(PartKind.ARGUMENTS, "{")
        elif _ARGUMENTS_FIRST.fullmatch(text):
            self._state = self._whole
        else:
            return self._give_up()
        return True

    def _whole(self) -> bool:
        """An object up to its end."""
        return self._hold_object(0) and self._decide("".join(self._object))

    def _arguments(self) -> bool:
        """The arguments of a call that has begun."""
        end = self._scanner.advance(self._buffer, self._outer_depth)
        self._add(PartKind.ARGUMENTS, self._read(len(self._buffer) if end is None else end))
        if end is None:
            return False
        self.is_complete = True
        self._state = self._tail if self._outer_depth else self._after
        return True

    def _tail(self) -> bool:
        """What closes the object around arguments. Models forget it, or go on with members that mean nothing here."""
        char = self._skip_space()
        if char == "":
            return False
        if char == ",":
            self._state = self._rest
        else:
            if char == "}":
                self._read(1)
                self._held.clear()
            self._state = self._after
        return True

    def _rest(self) -> bool:
        """The members after the arguments, up to the end of the object."""
        if not self._hold_object(0):
            return False
        if not _is_json('{"arguments":{}' + "".join(self._object)):
            return self._give_up()
        self._end_object()
        return True

    def _after(self) -> bool:
        """What closes a call, or separates it from the next."""
        closer = self._closers[-1] if self._closers else ""
        char = self._skip_space()
        if char == "":
            return False
        separator = "," if closer == "]" else self._format.separator
        if char == separator and self._may_call:
            self._held.append(self._read(1))
            self._state = self._begin_object
        elif closer and self._buffer.startswith(closer):
            self._read(len(closer))
            self._held.clear()
            self._closers.pop()
        elif closer and closer.startswith(self._buffer):
            return False
        else:
            self._closers.clear()
            self._state = self._seek
        return True

    # What the states do.

    @property
    def _may_call(self) -> bool:
        return bool(self._names) and (self._parallel or self.num_calls == 0)

    def _read(self, num_chars: int) -> str:
        """Take characters from the buffer."""
        text, self._buffer = self._buffer[:num_chars], self._buffer[num_chars:]
        return text

    def _skip_space(self) -> str:
        """Hold the white space that comes next; the character after it, or "" where none is there yet."""
        num_chars = len(self._buffer) - len(self._buffer.lstrip())
        if num_chars:
            self._held.append(self._read(num_chars))
        return self._buffer[:1]

    def _hold_object(self, *depths: int) -> bool:
        """Read on up to where the object has one of these depths; whether it is reached."""
        end = self._scanner.advance(self._buffer, *depths)
        self._object.append(self._read(len(self._buffer) if end is None else end))
        return end is not None

    def _decide(self, text: str) -> bool:
        """Whether a whole object is a call."""
        call = _read_call(text)
        if call is None or call[0] not in self._names:
            return self._give_up()
        self._begin_call(call[0])
        self._add(PartKind.ARGUMENTS, call[1])
        self.is_complete = True
        self._end_object()
        return True

    def _begin_call(self, name: str) -> None:
        """Arguments come next. Those in an object have its brace around them."""
        self._outer_depth = 1 if self._object else 0
        self._held.clear()
        self._object.clear()
        self.num_calls += 1
        self.is_complete = False
        self._is_blank = True
        self._add(PartKind.CALL, name)
        self._state = self._arguments

    def _end_object(self) -> None:
        self._held.clear()
        self._object.clear()
        self._state = self._after

    def _give_up(self) -> bool:
        """What is held is content."""
        text = "".join([*self._held, *self._object])
        self._held.clear()
        self._object.clear()
        self._closers.clear()
        self._state = self._seek
        self._content(text)
        return True

    def _content(self, text: str) -> None:
        """Content, or white space that is held until it is known what follows."""
        text = self._hidden.remove(text)
        if text == "":
            return
        if self._is_blank and text.isspace():
            self._held.append(text)
            return
        held = "".join(self._held)
        self._held.clear()
        self._is_blank = False
        self._add(PartKind.CONTENT, held + text)

    def _add(self, kind: PartKind, text: str) -> None:
        if text:
            self._parts.append(Part(kind, text))

    def _take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call as one JSON object, or None if it is none.

    Arguments may be left out or null, and they may be a JSON text in a string, as in OpenAI's answers.
    """
    try:
        call = msgspec.json.decode(text.encode(), type=_Call)
        arguments = bytes(call.arguments or call.parameters).decode()
        if arguments.startswith('"'):
            arguments = msgspec.json.decode(arguments)
        if arguments in ("", "null"):
            arguments = "{}"
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, and so are those of lone surrogates
        return None
    return call.name, arguments


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
