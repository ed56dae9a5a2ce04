"""Parse tool calls in an answer that arrives in pieces.

A call must name a tool of the request. Its arguments are converted to JSON as they arrive, and end where the format
says or at the end of the answer. So arguments can be streamed, and the result does not depend on how the text was split
into pieces.

Everything else is returned as content, unchanged: text before and after calls, calls of unknown tools, malformed
calls, and calls that end before their arguments. Only white space before the first call, between calls and after the
last one is removed, like the markers. Each character is read once or twice, so the time is linear in the text's length.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.text.parsers.answer_parts import AnswerPart, CallReader, HeldText, PartKind, PieceReader, Progress
from server.text.parsers.markers import Markers
from server.text.parsers.tool_formats import SLOTS, ObjectCall, ToolFormat, split_text


class ToolParser(PieceReader):
    """Splits text into content and tool calls."""

    def __init__(
        self, format: ToolFormat, tools: Mapping[str, Any], *, parallel: bool = True, hidden: Sequence[str] = ()
    ) -> None:
        """`tools` are the tools' schemas, prepared, by name. Without `parallel`, only the first call is one.

        `hidden` are markers to remove from content: control tokens that the client does not want to see.
        """
        super().__init__(self._seek)
        self.num_calls = 0
        self._format = format
        self._tools = tools
        self._parallel = parallel
        self._hidden = Markers(hidden)
        self._begins = _call_begins(format)
        self._markers = Markers([*self._begins, *hidden] if tools else hidden)
        self._separator = format.separator.strip()
        self._held = HeldText()  # layout and markers before a call
        self._openers: list[str] = []  # texts that may follow before the object of a call
        self._before = ""  # text that precedes the name of the tool, unless it was read with a marker
        self._reader: CallReader | None = None
        self._in_array = False
        self._closers: list[str] = []  # texts expected after the call, in their order
        self._is_blank = True  # only white space since the start or the last call
        self._parts: list[AnswerPart] = []

    @property
    def is_complete(self) -> bool:
        """False inside a call."""
        return self._reader is None or not self._reader.is_open

    @property
    def num_held(self) -> int:
        """Number of characters held back because their part is not determined yet."""
        in_reader = 0 if self._reader is None else self._reader.num_held
        return len(self.unread) + self._held.num_chars + in_reader

    def push(self, text: str) -> list[AnswerPart]:
        """Read the next piece of text; return the parts that it completes."""
        self._run(text)
        return self._take_parts()

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. Call it after the last piece of text."""
        rest = "".join([*self._held, self._reader.held if self._reader is not None else "", self.unread])
        is_layout = self._state == self._after or rest.strip() in ("", ",", self._separator)
        if not (self.num_calls and is_layout):
            self._add(PartKind.CONTENT, self._hidden.remove(rest))
        return self._take_parts()

    # The states.

    def _seek(self) -> bool:
        """Read content up to the start of a call."""
        if self._is_blank and self._may_call and self._format.is_bare:
            char = self._skip_space()
            if char == "":
                return False
            if self._may_begin_bare(char):
                self._begin_after("")
                return True
        match = self._markers.find_decided(self.unread)
        if match is None:
            self._content(self._read(len(self.unread) - self._markers.num_partial(self.unread)))
            return False
        self._content(self._read(match.start()))
        marker = self._read(len(match[0]))
        if marker in self._begins and self._may_call:
            self._held.append(marker)
            self._begin_after(marker)
        else:
            self._content(marker)
        return True

    def _open(self) -> bool:
        """Read what precedes the object of a call, if calls are objects, and choose the reader."""
        char = self._skip_space()
        if char == "":
            return False
        if self._openers:
            return self._read_opener()
        self._reader = self._format.arguments.new_reader(self._format, self._before, self._tools, self.unread)
        if self._reader is not None:
            self._state = self._call
        elif char == "[" and self._format.has_arrays and not self._in_array:
            self._held.append(self._read(1))
            self._in_array, self._before = True, self._format.before_name
            self._closers.insert(0, "]")
        else:
            return self._give_up()
        return True

    def _read_opener(self) -> bool:
        """Read the next of the texts that may precede an object."""
        opener = self._openers[0]
        if opener.startswith(self.unread) and opener != self.unread:
            return False
        if self.unread.startswith(opener):
            self._held.append(self._read(len(opener)))
        self._openers.pop(0)
        return True

    def _call(self) -> bool:
        """Read a call."""
        assert self._reader is not None
        progress = self._reader.push(self._read(len(self.unread)))
        parts, self._reader.parts = self._reader.parts, []
        for part in parts:
            if part.kind is PartKind.CALL:
                self._begin_call()
            self._parts.append(part)
        if progress is Progress.MORE:
            return False
        reader, self._reader = self._reader, None
        self.unread = reader.unread
        if progress is Progress.FAILED:
            return self._give_up(reader.rejected)
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Read the end of a call, or the separator between calls."""
        char = self._skip_space()
        if char == "":
            return False
        separator = "," if self._in_array else self._separator
        if any(text.startswith(self.unread) and text != self.unread for text in [separator, *self._closers]):
            return False
        index = next((i for i, closer in enumerate(self._closers) if self.unread.startswith(closer)), None)
        if separator and self.unread.startswith(separator) and self._may_call:
            self._held.append(self._read(len(separator)))
            self._begin_next()
        elif index is not None:
            self._read(len(self._closers[index]))
            self._held.clear()
            self._in_array = self._in_array and "]" in self._closers[index + 1 :]
            del self._closers[: index + 1]
        elif char == "{" and self._closers and self._format.before_name.startswith("{") and self._may_call:
            self._begin_next()  # the objects of calls may follow one another without markers of their own
        else:
            self._closers.clear()
            self._in_array = False
            self._state = self._seek
        return True

    # Helpers of the states.

    @property
    def _may_call(self) -> bool:
        return bool(self._tools) and (self._parallel or self.num_calls == 0)

    def _may_begin_bare(self, char: str) -> bool:
        before = self._format.before_name
        return char in ((self._format.start + before)[:1], before[:1])

    def _skip_space(self) -> str:
        """Hold back the next white space; return the character after it, or "" if it has not arrived yet."""
        num_chars = len(self.unread) - len(self.unread.lstrip())
        if num_chars:
            self._held.append(self._read(num_chars))
        return self.unread[:1]

    def _begin_after(self, marker: str) -> None:
        """Read a call after a marker that begins one; "" stands for the beginning of a call without one."""
        begin = self._begins.get(marker, _Begin((), self._format.start + self._format.before_name))
        self._openers, self._before, self._closers = list(begin.openers), begin.before, _closers(self._format)
        self._in_array = False
        self._state = self._open

    def _begin_next(self) -> None:
        """Read a call after a separator."""
        self._openers, self._before = [], self._format.before_name
        self._state = self._open

    def _begin_call(self) -> None:
        self._held.clear()
        self.num_calls += 1
        self._is_blank = True
        if not self._in_array:
            self._closers = _closers(self._format)

    def _give_up(self, rejected: str = "") -> bool:
        """Return the held text as content."""
        text = "".join([*self._held, rejected])
        self._held.clear()
        self._closers.clear()
        self._is_blank = False
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


class _Begin(NamedTuple):
    """What may follow a marker that begins a call."""

    openers: Sequence[str]  # before the object of a call
    before: str  # before the name of the tool


def begin_markers(format: ToolFormat) -> list[str]:
    """Return the markers that begin a call in an answer; the first is the one that the model is trained to write."""
    return list(_call_begins(format))


def _call_begins(format: ToolFormat) -> dict[str, _Begin]:
    """Return the markers that begin a call, with what may follow each of them."""
    begins: dict[str, _Begin] = {}
    for text in [*format.arguments.begins(format), *format.triggers]:
        pieces = split_text(text)
        if pieces and not SLOTS.match(pieces[0]) and (_is_marker(pieces[0]) or not (begins or format.is_bare)):
            openers = pieces[1:] if isinstance(format.arguments, ObjectCall) else []
            begins.setdefault(pieces[0], _Begin(openers, text.lstrip()[len(pieces[0]) :]))
    return begins


def _is_marker(piece: str) -> bool:
    """Return whether a text is distinctive enough to begin a call wherever it occurs, beside a first one."""
    return len(piece) > 2 and piece[0] not in "{["


def _closers(format: ToolFormat) -> list[str]:
    """Return the texts that may follow a call."""
    return [*format.arguments.ends(format), *format.closers]
