"""Arguments that are values between tags: the syntax, its reader, its grammar, and how it is found."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from server.parts.tool_formats.argument_schema import JSON_TYPES, STRING, ArgumentSchema, to_json
from server.parts.tool_formats.grammar import ArgumentGrammar, Property, times
from server.parts.tool_formats.named import UNDECIDED, ArgumentsReader, Head, NamedArguments
from server.text.parsers.answer_parts import PieceReader
from server.text.parsers.markers import Markers, MarkerWriter
from server.text.parsers.tool_formats import KEY, Schema, UnsupportedSchemaError

MAX_DEPTH = 64  # of tags in tags
ITEM = "item"


class TaggedArguments(NamedArguments, msgspec.Struct, frozen=True, tag=True):
    """Each argument is a value between tags; strings are written as they are, and other values as JSON.

    Attributes:
        after_key: the text between a parameter's name and its value.
        after_keys: this text for each JSON type, if the format tells the type of a value.
        is_padded: a line break before the value and one after it are layout.
        is_nested: values of objects and arrays are tags in turn: `<key>` for members, `<item>` for items.
    """

    before_key: str
    after_key: str
    after_value: str
    after_keys: Mapping[str, str] = {}
    is_padded: bool = False
    is_nested: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.before_key, self.after_key, self.after_value, *self.after_keys.values())

    @property
    def value_end(self) -> str:
        """The marker that ends a value."""
        return self.after_value.strip()

    @property
    def namespace(self) -> str:
        """The text before each tag within a value."""
        return self.value_end.partition("</")[0]

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
        after_keys = dict.fromkeys(syntax.after_keys.values()) or [syntax.after_key]
        self._heads = [(Head(syntax.before_key + KEY + after_key), after_key) for after_key in after_keys]
        self._json = ["{"]
        self._is_complete = False
        self._num_keys = 0
        # The current argument.
        self._key = ""
        self._types = JSON_TYPES
        self._end = Markers(())
        self._begin_tag: str | None = None  # of the value, if it may have members of the same name
        self._depth = 0  # of the value's tags
        self._value: list[str] = []

    def push(self, text: str) -> tuple[str, bool]:
        self._run(text)
        json, self._json = "".join(self._json), []
        return json, self._is_complete

    # The states.

    def _read_key(self) -> bool:
        """Read the name of the next argument, or find that there is none."""
        for head, after_key in self._heads:
            match = head.match(self.unread)
            if match is UNDECIDED:
                return False
            if match is not None:
                self.unread = self.unread[match.end :]
                self._begin_value(match.slots[KEY], after_key)
                return True
        self._json.append("}")
        self._is_complete = True
        return False

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
        self._depth += 1 if match[0] == self._begin_tag else -1
        if self._depth:
            self._value.append(match[0])
            return True
        self._json.append('"' if self._types == STRING else self._convert("".join(self._value)))
        self._state = self._read_key
        return True

    # Helpers of the states.

    def _begin_value(self, key: str, after_key: str) -> None:
        self._key, self._value = key, []
        self._types = self._schema.parameter_types(key)
        told = frozenset(kind for kind, text in self._syntax.after_keys.items() if text == after_key)
        if told:
            self._types = STRING if told == STRING else (self._types - STRING or JSON_TYPES - STRING)
        end = self._syntax.value_end.replace(KEY, key)
        self._begin_tag, self._depth = None, 1
        if self._is_nested:
            self._begin_tag = f"{self._syntax.namespace}<{key}>"
        ends = [end, "\n" + end] if self._syntax.is_padded else [end]
        self._end = Markers(ends if self._begin_tag is None else [*ends, self._begin_tag])
        self._state = self._skip_line_break if self._syntax.is_padded else self._read_value
        separator, quote = (", " if self._num_keys else ""), ('"' if self._types == STRING else "")
        self._json.append(f"{separator}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._num_keys += 1

    @property
    def _is_nested(self) -> bool:
        """True if the value's members and items are tags."""
        return self._syntax.is_nested and not self._types & STRING

    def _convert(self, text: str) -> str:
        if self._is_nested:
            return nested_to_json(text, self._schema, self._key, self._syntax)
        return to_json(text, self._types)


def nested_to_json(text: str, schema: ArgumentSchema, key: str, syntax: TaggedArguments) -> str:
    """Return the value of a parameter as JSON. Text without tags, or with tags that do not match, is a plain value.

    Args:
        schema: the schema of the tool's parameters.
        key: the parameter's name.
    """
    converter = _Converter(syntax.namespace, schema)
    return converter.convert(text, converter.member(schema.root, key))


class _Converter:
    def __init__(self, namespace: str, schema: ArgumentSchema) -> None:
        """`namespace` is the text before each tag."""
        self._tag = re.compile(rf"{re.escape(namespace)}<(/?)([^<>/]+)>")
        self._schema = schema

    def member(self, schema: Any, name: str) -> Any:
        """Return the schema of a member of objects with this schema."""
        schema = self._schema.resolve(schema)
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            return properties[name]
        return schema.get("additionalProperties", {})

    def convert(self, text: str, schema: Any, depth: int = 0) -> str:
        types = self._schema.types(schema)
        elements = self._elements(text) if depth < MAX_DEPTH else []
        if not elements:
            empty = "{}" if "object" in types else "[]"
            return empty if not text.strip() and types <= {"object", "array"} else to_json(text, types)
        is_array = "object" not in types or ("array" in types and all(name == ITEM for name, _ in elements))
        if is_array:
            items = self._schema.resolve(schema).get("items", {})
            return f"[{', '.join(self.convert(value, items, depth + 1) for _, value in elements)}]"
        values = [self.convert(value, self.member(schema, name), depth + 1) for name, value in elements]
        names = [json.dumps(name, ensure_ascii=False) for name, _ in elements]
        return f"{{{', '.join(f'{name}: {value}' for name, value in zip(names, values, strict=True))}}}"

    def _elements(self, text: str) -> list[tuple[str, str]]:
        """Return the outermost tags with the text in them; none if there is other text, or tags do not match."""
        elements: list[tuple[str, str]] = []
        names: list[str] = []
        begin = end = 0
        for match in self._tag.finditer(text):
            is_end, name = bool(match[1]), match[2]
            if not names and (is_end or text[end : match.start()].strip()):
                return []
            if not is_end:
                begin = begin if names else match.end()
                names.append(name)
            elif name != names.pop():
                return []
            elif not names:
                elements.append((name, text[begin : match.start()]))
                end = match.end()
        return [] if names or text[end:].strip() else elements


class TaggedGrammar(ArgumentGrammar):
    """Writes the rules of values between tags."""

    def __init__(self, name: str, syntax: TaggedArguments, schema: Schema, markers: MarkerWriter) -> None:
        super().__init__(name, schema, markers)
        self.syntax = syntax

    def argument(self, each: Property, any_name: str) -> str:
        text, end = self.syntax.before_key.replace(KEY, ""), self.syntax.after_value
        if self.syntax.is_nested:
            return self._member(each, f"{self.syntax.before_key}{{}}{self.syntax.after_key}", end.replace(KEY, "{}"))
        before = f"{self.markers.write(text) if text else ''} {self.key(each, any_name)}"
        if self.syntax.after_keys:
            return f"{before} ({' | '.join(self._typed_values(each.schema, self.syntax, end))})"
        return f"{before} {self.markers.write(self.syntax.after_key)} {self._text_value(each.schema, end)}"

    def _typed_values(self, schema: Any, syntax: TaggedArguments, end: str) -> Iterator[str]:
        """Yield the values of each type with the text before them, which tells the type."""
        types = self.schema.types(schema)
        for kind, after_key in syntax.after_keys.items():
            names = frozenset(("integer", "number")) if kind == "number" else frozenset((kind,))
            if not names & types:
                continue
            narrowed = self.narrow(schema, names)
            value = self.text(narrowed, end) if kind == "string" else f"{self.json(narrowed)} {self.markers.write(end)}"
            yield f"{self.markers.write(after_key)} {value}"

    def _text_value(self, schema: Any, end: str) -> str:
        """Return the expression of a value that stands in the text as it is, if it is a string, up to `end`."""
        types = self.schema.types(schema)
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

    def _nested(self, schema: Any, end: str) -> str:
        """Return the name of the rule of a value whose members and items are tags, up to `end`."""
        return self.named(f"nested {end} {json.dumps(schema)}", lambda: self._write_nested(schema, end))

    def _write_nested(self, schema: Any, end: str) -> str:
        types = self.schema.types(schema)
        if not types & {"object", "array"} or types == JSON_TYPES:
            return self._text_value(schema, end)
        tag = self.syntax.namespace + "<{}>", self.syntax.namespace + "</{}>"
        alternatives = []
        if "object" in types:
            objects = self.objects(self.narrow(schema, frozenset(("object",))))
            alternatives += [self.members(each, lambda one, _: self._member(one, *tag)) for each in objects]
        if "array" in types and "object" not in types:
            narrowed = self.schema.resolve(schema)
            item = self.rule(self._member(Property(ITEM, narrowed.get("items", {})), *tag))
            alternatives.append(f"{item}{times(narrowed)}")
        if types - {"object", "array"}:
            raise UnsupportedSchemaError(
                "values of several types are not supported in this model's format of tool calls"
            )
        return f"({' | '.join(alternatives)}) {self.markers.write(end)}"

    def _member(self, each: Property, begin: str, end: str) -> str:
        """Return the expression of a member, which may hold others, between tags with its name."""
        if each.name is None:
            raise UnsupportedSchemaError("further properties are not supported in this model's format of tool calls")
        begin, end = begin.replace("{}", each.name), end.replace("{}", each.name)
        return f"{self.markers.write(begin)} {self._nested(each.schema, end)}"
