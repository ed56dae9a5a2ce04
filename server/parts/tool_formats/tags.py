"""Arguments that are values between tags: the syntax, its reader and its grammar."""

import json
from typing import Any

import msgspec

from server.parts.tool_formats.argument_schema import JSON_TYPES, STRING, ArgumentSchema, to_json
from server.parts.tool_formats.grammar import ArgumentGrammar, Property
from server.parts.tool_formats.named import UNDECIDED, ArgumentsReader, Head, NamedArguments
from server.text.parsers.answer_parts import PieceReader
from server.text.parsers.markers import Markers, MarkerWriter
from server.text.parsers.tool_formats import KEY, Schema


class TaggedArguments(NamedArguments, msgspec.Struct, frozen=True, tag=True):
    """Each argument is a value between tags; strings are written as they are, and other values as JSON.

    Attributes:
        after_key: the text between a parameter's name and its value.
        is_padded: a line break before the value and one after it are layout.
    """

    before_key: str
    after_key: str
    after_value: str
    is_padded: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        return self.before_key, self.after_key, self.after_value

    def prepare(self, schema: Schema) -> ArgumentSchema:
        return ArgumentSchema(schema)

    def arguments_reader(self, schema: ArgumentSchema) -> "TaggedArgumentsReader":
        return TaggedArgumentsReader(self, schema)

    def write_rules(self, name: str, schema: Schema, markers: MarkerWriter) -> list[str]:
        return TaggedGrammar(name, self, schema, markers).write()


class TaggedArgumentsReader(PieceReader, ArgumentsReader):
    """Converts arguments to JSON. Values of strings are converted as they arrive, others when they are complete.

    Text that is neither an argument nor white space ends the arguments.
    """

    def __init__(self, syntax: TaggedArguments, schema: ArgumentSchema) -> None:
        """`schema` is that of the tool's parameters."""
        super().__init__(self._read_key)
        self._syntax = syntax
        self._schema = schema
        self._head = Head(syntax.before_key + KEY + syntax.after_key)
        end = syntax.after_value.strip()
        self._end = Markers([end, "\n" + end] if syntax.is_padded else [end])  # of a value
        self._json = ["{"]
        self._is_complete = False
        self._num_keys = 0
        # The current argument.
        self._types = JSON_TYPES
        self._value: list[str] = []

    def push(self, text: str) -> tuple[str, bool]:
        self._run(text)
        json, self._json = "".join(self._json), []
        return json, self._is_complete

    # The states.

    def _read_key(self) -> bool:
        """Read the name of the next argument, or find that there is none."""
        match = self._head.match(self.unread)
        if match is UNDECIDED:
            return False
        if match is None:
            self._json.append("}")
            self._is_complete = True
            return False
        self.unread = self.unread[match.end :]
        self._begin_value(match.slots[KEY])
        return True

    def _skip_line_break(self) -> bool:
        """Read the line break before a value."""
        if self.unread:
            self.unread = self.unread.removeprefix("\n")
            self._state = self._read_value
        return bool(self.unread)

    def _read_value(self) -> bool:
        """Read a value up to its end."""
        match = self._end.find(self.unread)
        end = len(self.unread) - self._end.num_partial(self.unread) if match is None else match.start()
        text, self.unread = self.unread[:end], self.unread[end if match is None else match.end() :]
        if self._types == STRING:
            self._json.append(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)
        if match is None:
            return False
        self._json.append('"' if self._types == STRING else to_json("".join(self._value), self._types))
        self._state = self._read_key
        return True

    def _begin_value(self, key: str) -> None:
        self._value, self._types = [], self._schema.parameter_types(key)
        self._state = self._skip_line_break if self._syntax.is_padded else self._read_value
        separator, quote = (", " if self._num_keys else ""), ('"' if self._types == STRING else "")
        self._json.append(f"{separator}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._num_keys += 1


class TaggedGrammar(ArgumentGrammar):
    """Writes the rules of values between tags."""

    def __init__(self, name: str, syntax: TaggedArguments, schema: Schema, markers: MarkerWriter) -> None:
        super().__init__(name, schema, markers)
        self.syntax = syntax

    def argument(self, each: Property, any_name: str) -> str:
        before = f"{self.markers.write(self.syntax.before_key)} {self.key(each, any_name)}"
        return f"{before} {self.markers.write(self.syntax.after_key)} {self._value(each.schema)}"

    def _value(self, schema: Any) -> str:
        """Return the expression of a value up to its end, which stands in the text as it is if it is a string."""
        types, end = self.schema.types(schema), self.syntax.after_value
        if types == STRING:
            return self.text(schema, end)
        if types == JSON_TYPES:  # any text is a value
            return self.text({}, end)
        others = types - STRING
        json_value = f"{self.json(self.narrow(schema, others))} {self.markers.write(end)}" if others else ""
        if "string" not in types:
            return json_value
        # A string must not look like a value of another type.
        text = self.text(self.narrow(schema, STRING), end, r" & /[^\[\]{}\"0-9tfnTFN \t\r\n\-](.|\n)*/")
        return f"({json_value} | {text})"
