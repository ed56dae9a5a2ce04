"""Calls that begin with the tool's name: their syntax, and the reader of one call, which arrives in pieces."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from server.text.parsers.answer_parts import AnswerPart, CallReader, JSONScanner, PartKind, Progress
from server.text.parsers.tool_formats import ID, INDEX, KEY, NAME, SLOTS, Arguments, ObjectCall, ToolFormat, split_text

MAX_HEAD_CHARS = 512
MAX_SPACE = 256  # characters of white space between a tool's name and its arguments
SLOT_PATTERNS = {
    NAME: re.compile(r"[a-zA-Z0-9_.-]{1,128}"),
    ID: re.compile(r"[a-zA-Z0-9_.:-]{1,128}"),
    INDEX: re.compile(r"[0-9]{1,9}"),
    KEY: re.compile(r"""[^<>"'=:,(){}\s/][^<>"\n=]{0,127}"""),
}


@dataclass(frozen=True, slots=True)
class HeadMatch:
    """The result of matching a head.

    Attributes:
        end: the index after the head; None if more text is needed.
        slots: the texts of the slots.
    """

    end: int | None
    slots: dict[str, str] = field(default_factory=dict)


UNDECIDED = HeadMatch(None)


class Head:
    """A sequence of literal texts and slots. White space may stand between them, except where the text needs none."""

    def __init__(self, text: str) -> None:
        self._parts = split_text(text)

    def match(self, text: str) -> HeadMatch | None:
        """Match the beginning of a text; return None if no continuation of it matches.

        A match does not change when more text follows.
        """
        found = self._match(text)
        if found is UNDECIDED and len(text) <= MAX_HEAD_CHARS:
            return found
        return None if found is None or found.end is None or found.end > MAX_HEAD_CHARS else found

    def _match(self, text: str) -> HeadMatch | None:
        position, slots = 0, dict[str, str]()
        for part in self._parts:
            position += len(text[position:]) - len(text[position:].lstrip())
            rest = text[position:]
            if SLOTS.match(part):
                found = SLOT_PATTERNS[part].match(rest)
                if found is None or found.end() == len(rest):
                    return UNDECIDED if found or not rest else None
                slots[part] = found[0].rstrip()
                position += found.end()
            elif rest.startswith(part):
                position += len(part)
            else:
                return UNDECIDED if part.startswith(rest) else None
        return HeadMatch(position, slots)


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


class JSONArgumentsReader(ArgumentsReader):
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


class NamedCallReader(CallReader):
    """Reads a call that begins with text and the tool's name, up to the end of its arguments."""

    def __init__(self, heads: Sequence[Head], new_reader: Callable[[str], ArgumentsReader | None]) -> None:
        """Prepare the reader.

        Args:
            heads: the forms of the text up to the arguments.
            new_reader: returns a reader of the arguments of the tool with this name, None if there is no such tool.
        """
        self.parts: list[AnswerPart] = []
        self.is_open = False
        self.unread = ""
        self.rejected = ""
        self._heads = list(heads)
        self._new_reader = new_reader
        self._reader: ArgumentsReader | None = None

    @property
    def held(self) -> str:
        return "" if self._reader is not None else self.unread

    @property
    def num_held(self) -> int:
        return len(self.unread if self._reader is None else self._reader.unread)

    def push(self, text: str) -> Progress:
        if self._reader is None:
            self.unread += text
            progress = self._read_head()
            if progress is not None:
                return progress
            text, self.unread = self.unread, ""
        return self._read_arguments(text)

    def _read_head(self) -> Progress | None:
        """Read the head; return None if it is complete."""
        while self._heads:
            match = self._heads[0].match(self.unread)
            if match is UNDECIDED:
                return Progress.MORE
            if match is not None and match.end is not None:
                rest, reader = self.unread[match.end :], self._new_reader(match.slots[NAME])
                num_spaces = len(rest) - len(rest.lstrip())
                begins = reader is not None and num_spaces <= MAX_SPACE and reader.begins_with(rest)
                if begins is None:
                    return Progress.MORE
                if begins:
                    self.parts.append(AnswerPart(PartKind.CALL, match.slots[NAME]))
                    self._reader, self.unread, self.is_open = reader, rest, True
                    return None
            self._heads.pop(0)
        return Progress.FAILED

    def _read_arguments(self, text: str) -> Progress:
        assert self._reader is not None
        json, is_complete = self._reader.push(text)
        if json:
            self.parts.append(AnswerPart(PartKind.ARGUMENTS, json))
        if not is_complete:
            return Progress.MORE
        self.is_open = False
        self.unread = self._reader.unread
        return Progress.DONE


class NamedArguments(Arguments):
    """A call is the tool's name and its arguments, with texts around both.

    Attributes:
        close: the beginning of the text after the arguments, if their reader reads it.
    """

    close: str = ""

    def arguments_reader(self, schema: Any) -> ArgumentsReader:
        """Return a reader of the arguments of one call. `schema` is what `prepare` has returned."""
        raise NotImplementedError

    def begins(self, format: ToolFormat) -> list[str]:
        before = format.before_name
        return [format.start + before, before, before[before.rfind("<") :] if "<" in before else ""]

    def ends(self, format: ToolFormat) -> list[str]:
        return [*split_text(format.after_arguments.removeprefix(self.close)), *split_text(format.end)]

    def new_reader(self, format: ToolFormat, before: str, tools: Mapping[str, Any], text: str) -> CallReader:
        heads = [Head(before + NAME + after) for after in (format.after_name, *format.name_ends)]
        return NamedCallReader(heads, lambda name: self.arguments_reader(tools[name]) if name in tools else None)


class JSONArguments(NamedArguments, msgspec.Struct, frozen=True, tag=True):
    """The arguments are a JSON object after the tool's name."""

    def arguments_reader(self, schema: Any) -> ArgumentsReader:
        return JSONArgumentsReader()


class MistralCall(ObjectCall, frozen=True, tag=True):
    """A call is an object in an array, or after the marker the tool's name and a JSON object."""

    def new_reader(self, format: ToolFormat, before: str, tools: Mapping[str, Any], text: str) -> CallReader | None:
        if text[0] in "{[" or before.strip():
            return super().new_reader(format, before, tools, text)
        heads = [Head(NAME + after) for after in format.name_ends]
        return NamedCallReader(heads, lambda name: JSONArgumentsReader() if name in tools else None)
