"""Parse tool calls in an answer that arrives in pieces.

A call must name a tool of the request. It counts as a call from the first brace of its arguments on, and the arguments
are the model's text up to the matching brace or the end of the answer. So arguments can be streamed, and the result
does not depend on how the text was split into pieces. If the arguments do not follow the name directly, the parser
waits for the end of the call.

Everything else is returned as content, unchanged: text before and after calls, calls of unknown tools, malformed
calls, and calls that end before their arguments. Only white space before the first call, between calls and after the
last one is removed, like the markers. Each character is read once or twice, so the time is linear in the text's length.
"""

import re
from collections.abc import Collection, Sequence

import msgspec

from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.parsers.json_scanner import JSONScanner
from server.text.parsers.markers import Markers
from server.text.parsers.tool_formats import ToolFormat

MAX_HEAD_CHARS = 256  # of a bare name before its arguments, and of an object up to the end of its first key

_NAME = r"[a-zA-Z0-9_-]{1,64}"
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"]*)"|[^"\s])')
_KEYS = ("name", "type", "arguments", "parameters", None)  # None: the object has no key
# A call as an object, up to the opening brace of its arguments.
_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    rf'"name"\s*:\s*"({_NAME})"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{'
)
_ARGUMENTS_FIRST = re.compile(r'\{\s*"(?:arguments|parameters)"\s*:\s*\{')
_NAMED_HEAD = re.compile(rf"\s*({_NAME})\s*(?:\[CALL_ID\][a-zA-Z0-9_-]{{1,64}})?(?:\[ARGS\])?\s*")


class ToolParser:
    """Splits text into content and tool calls.

    A state machine: each state is a method that reads from the buffer. A state returns False if it needs more text.
    """

    def __init__(
        self, format: ToolFormat, names: Collection[str], *, parallel: bool = True, hidden: Sequence[str] = ()
    ) -> None:
        """`names` are the names of the tools. Without `parallel`, all text after the first call is content.

        `hidden` are markers to remove from content: control tokens that the client does not want to see.
        """
        self.num_calls = 0
        self.is_complete = True  # False inside a call
        self._format = format
        self._names = frozenset(names)
        self._parallel = parallel
        self._hidden = Markers(hidden)
        self._markers = Markers([format.start, *hidden] if names else hidden)
        self._state = self._seek
        self._buffer = ""  # unread text
        self._held: list[str] = []  # text read but undecided: layout and markers before a call
        self._object: list[str] = []  # the text after it: an object that may be a call
        self._scanner = JSONScanner()
        self._outer_depth = 0  # nesting depth around the current arguments
        self._closers: list[str] = []  # brackets and markers expected after the call, the innermost last
        self._is_blank = True  # only white space since the start or the last call
        self._parts: list[AnswerPart] = []

    @property
    def is_holding(self) -> bool:
        """True if text is held back because its part is not determined yet."""
        return bool(self._buffer or self._held or self._object)

    @property
    def num_held(self) -> int:
        """Number of characters held back."""
        return sum(map(len, [self._buffer, *self._held, *self._object]))

    def push(self, text: str) -> list[AnswerPart]:
        """Read the next piece of text; return the parts that it completes."""
        self._buffer += text
        while self._state():
            pass
        return self._take_parts()

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. Call it after the last piece of text."""
        rest = "".join([*self._held, *self._object, self._buffer])
        is_layout = self._state == self._after or rest.strip() in ("", ",", self._format.separator)
        if not (self.num_calls and is_layout):
            self._add(PartKind.CONTENT, self._hidden.remove(rest))
        return self._take_parts()

    # The states. Each returns False if it needs more text, and True to run the next state.

    def _seek(self) -> bool:
        """Read content up to the start of a call."""
        if self._is_blank and self._may_call and self._format.is_bare:
            char = self._skip_space()
            if char == "":
                return False
            if char == "{" or (char == "[" and self._format.has_arrays):
                self._state = self._begin_object
                return True
        match = self._markers.find(self._buffer)
        if match is None:
            self._content(self._read(len(self._buffer) - self._markers.num_partial(self._buffer)))
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
        """Read the opening bracket of a call or of an array of calls, or find a name."""
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
        """Read a name up to the opening brace of its arguments."""
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
        """Read the first key of an object, which often shows that it is not a call."""
        key = _FIRST_KEY.match(self._buffer)
        if key is None and len(self._buffer) <= MAX_HEAD_CHARS:
            return False
        if key is not None and key.end() <= MAX_HEAD_CHARS and key[1] not in _KEYS:
            self._object.append(self._read(key.end()))
            return self._give_up()
        self._state = self._header
        return True

    def _header(self) -> bool:
        """Read an object up to its arguments, or to its end."""
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
            self._state = self._whole_object
        else:
            return self._give_up()
        return True

    def _whole_object(self) -> bool:
        """Read an object up to its end."""
        return self._hold_object(0) and self._decide("".join(self._object))

    def _arguments(self) -> bool:
        """Read the arguments of the current call."""
        end = self._scanner.advance(self._buffer, self._outer_depth)
        self._add(PartKind.ARGUMENTS, self._read(len(self._buffer) if end is None else end))
        if end is None:
            return False
        self.is_complete = True
        self._state = self._tail if self._outer_depth else self._after
        return True

    def _tail(self) -> bool:
        """Read the end of the object around the arguments. Models may omit it, or add members, which are ignored."""
        char = self._skip_space()
        if char == "":
            return False
        if char == ",":
            self._state = self._other_members
        else:
            if char == "}":
                self._read(1)
                self._held.clear()
            self._state = self._after
        return True

    def _other_members(self) -> bool:
        """Read the members after the arguments, up to the end of the object."""
        if not self._hold_object(0):
            return False
        if not _is_json('{"arguments":{}' + "".join(self._object)):
            return self._give_up()
        self._end_object()
        return True

    def _after(self) -> bool:
        """Read the end of a call, or the separator between calls."""
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

    # Helpers of the states.

    @property
    def _may_call(self) -> bool:
        return bool(self._names) and (self._parallel or self.num_calls == 0)

    def _read(self, num_chars: int) -> str:
        """Remove characters from the buffer and return them."""
        text, self._buffer = self._buffer[:num_chars], self._buffer[num_chars:]
        return text

    def _skip_space(self) -> str:
        """Hold back the next white space; return the character after it, or "" if it has not arrived yet."""
        num_chars = len(self._buffer) - len(self._buffer.lstrip())
        if num_chars:
            self._held.append(self._read(num_chars))
        return self._buffer[:1]

    def _hold_object(self, *depths: int) -> bool:
        """Read the object until its brackets are nested to one of `depths`; return whether that was reached."""
        end = self._scanner.advance(self._buffer, *depths)
        self._object.append(self._read(len(self._buffer) if end is None else end))
        return end is not None

    def _decide(self, text: str) -> bool:
        """Emit a whole object as a call, or return it as content if it is not one."""
        call = _read_call(text)
        if call is None or call[0] not in self._names:
            return self._give_up()
        self._begin_call(call[0])
        self._add(PartKind.ARGUMENTS, call[1])
        self.is_complete = True
        self._end_object()
        return True

    def _begin_call(self, name: str) -> None:
        """Emit the name of a call, and read its arguments next. Arguments inside an object have depth 1, others 0."""
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
        """Return the held text as content."""
        text = "".join([*self._held, *self._object])
        self._held.clear()
        self._object.clear()
        self._closers.clear()
        self._state = self._seek
        self._content(text)
        return True

    def _content(self, text: str) -> None:
        """Emit content; hold back white space before it until other text follows."""
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
            self._parts.append(AnswerPart(kind, text))

    def _take_parts(self) -> list[AnswerPart]:
        parts, self._parts = self._parts, []
        return parts


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


def _read_call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments of a call written as one JSON object, or None if it is not a call.

    Arguments may be missing or null, or a string that contains JSON, as in OpenAI's answers.
    """
    try:
        call = msgspec.json.decode(text.encode(), type=_Call)
        arguments = bytes(call.arguments or call.parameters).decode()
        if arguments.startswith('"'):
            arguments = msgspec.json.decode(arguments)
        if arguments in ("", "null"):
            arguments = "{}"
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):  # msgspec's errors and those about lone surrogates are ValueErrors
        return None
    return call.name, arguments


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
