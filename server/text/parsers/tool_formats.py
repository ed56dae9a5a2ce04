"""The formats in which models write tool calls.

A format is data: the texts around calls, and the syntax of their arguments. `server.text.templates.tool_probe` finds
them in what a chat template renders; the parser and the grammar of forced calls follow from them. Here are the formats
whose calls are JSON objects; others are in the part `tool_formats`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.text.parsers.answer_parts import CallReader
from server.text.parsers.markers import MarkerWriter
from server.text.parsers.object_reader import ObjectCallReader

Schema = Mapping[str, Any]

# Slots in the texts of a format: the tool's name, a call's id, its number, and the name of a parameter.
NAME, ID, INDEX, KEY = "\ue000", "\ue001", "\ue002", "\ue003"
SLOTS = re.compile(f"[{NAME}{ID}{INDEX}{KEY}]")

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # of JSON in calls


class UnsupportedSchemaError(ValueError):
    """A schema that calls in the model's format cannot follow. The message may be shown to clients."""


class Arguments:
    """The syntax of a call and its arguments, from which the parser and the grammar follow.

    The classes are structs of msgspec.
    """

    @property
    def texts(self) -> tuple[str, ...]:
        """Markers in the arguments."""
        return ()

    def prepare(self, schema: Schema) -> Any:
        """Return what readers of a tool's arguments need of their schema, which they share."""

    def begins(self, format: "ToolFormat") -> list[str]:
        """Return the texts that may begin a call, whose first piece is a marker."""
        raise NotImplementedError

    def ends(self, format: "ToolFormat") -> list[str]:
        """Return the pieces of text that may follow a call."""
        raise NotImplementedError

    def new_reader(self, format: "ToolFormat", before: str, tools: Mapping[str, Any], text: str) -> CallReader | None:
        """Return a reader of one call, or None if none begins with `text`, which is not empty.

        `before` is the text that precedes the tool's name, as far as it was not read with a marker. `tools` are the
        tools' schemas, prepared, by name.
        """
        raise NotImplementedError

    def write_rules(self, name: str, schema: Schema, markers: MarkerWriter) -> list[str]:
        """Return the rule `name` of arguments that are valid under a schema, and others that it needs.

        Raises UnsupportedSchemaError.
        """
        return [f"{name}: %json {json.dumps({**schema, 'x-guidance': SPACING})}"]


class ObjectCall(Arguments, msgspec.Struct, frozen=True, tag=True):
    """The whole call is a JSON object, with the tool's name and its arguments as members."""

    name_key: str = "name"
    arguments_key: str = "arguments"

    def begins(self, format: "ToolFormat") -> list[str]:
        return [format.object_start, format.before_name.partition("{")[0]]

    def ends(self, format: "ToolFormat") -> list[str]:
        return split_text(format.object_end)

    def new_reader(self, format: "ToolFormat", before: str, tools: Mapping[str, Any], text: str) -> CallReader | None:
        return ObjectCallReader(self.name_key, self.arguments_key, tools) if text.startswith("{") else None


OBJECT_CALL = ObjectCall()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A format of tool calls: `start`, calls with `separator` between them, `end`.

    A call is `before_name`, the tool's name, `after_name`, the arguments and `after_arguments`. White space at the ends
    of these texts and between their tags is written to the model, but need not be in its answers.

    Attributes:
        is_bare: calls may also appear without `start`, if the answer has no other content.
        triggers, closers: further markers that may begin and end a call.
        name_ends: further texts after the name.
        several: whether the template can write several calls in an answer.
        id_length: number of characters of a call's id, if the template requires a fixed one.
        is_recognized: False if the template writes calls that no format describes.
    """

    name: str
    start: str = ""
    before_name: str = '{"name": "'
    after_name: str = '", "arguments": '
    after_arguments: str = "}"
    separator: str = ""
    end: str = ""
    arguments: Arguments = OBJECT_CALL
    is_bare: bool = False
    triggers: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    name_ends: tuple[str, ...] = ()
    several: bool = True
    id_length: int | None = None
    is_recognized: bool = True

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the format. Special tokens in them must be kept in the answer's text for the parser."""
        texts = (self.start, self.before_name, self.after_name, *self.name_ends, self.after_arguments, self.end)
        return tuple(filter(None, (*texts, *self.triggers, *self.closers, *self.arguments.texts)))

    def write_calls(self, functions: Sequence[Mapping[str, Any]]) -> str:
        """Return calls with these names and arguments as the model writes them; "" if they are no objects."""
        if not isinstance(self.arguments, ObjectCall):
            return ""
        texts = [
            self.before_name
            + function["name"]
            + self.after_name
            + json.dumps(function["arguments"], ensure_ascii=False)
            + self.after_arguments
            for function in functions
        ]
        return self.start + self.separator.join(texts) + self.end

    @property
    def has_arrays(self) -> bool:
        """True if several calls may be in a JSON array."""
        return isinstance(self.arguments, ObjectCall) and self.end.lstrip().startswith("]")

    @property
    def object_start(self) -> str:
        """The text before the first call, without the bracket of a JSON array and the object itself."""
        before = self.before_name.partition("{")[0]
        return self.start.rstrip().removesuffix("[") + before if self.has_arrays else self.start + before

    @property
    def object_end(self) -> str:
        """The text after the object of the last call, and after the bracket of an array."""
        after = self.after_arguments.rpartition("}")[2]
        return after + (self.end.lstrip().removeprefix("]") if self.has_arrays else self.end)


def split_text(text: str) -> list[str]:
    """Split a text at white space, between adjacent tags and around slots."""
    parts = re.split(rf"\s+|(?<=>)(?=<|\[(?!<))|({SLOTS.pattern})", text)
    return [part for part in parts if part]


GENERIC = ToolFormat(
    "generic", start="[", separator=", ", end="]", is_bare=True, triggers=("<tool_call>",), closers=("</tool_call>",)
)
