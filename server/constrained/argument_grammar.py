"""The grammar of a tool's arguments that are not one JSON object: values between tags, or literals of a language.

Arguments are written in the order of the schema's properties. Strings stand as they are in the text, so their schema
becomes a regular expression; other values follow their schema as JSON where the format writes JSON.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.grammar.compiler import MAX_GRAMMAR_BYTES
from server.constrained.marker_writer import ANYTHING, MarkerWriter, literal
from server.constrained.regex import escape_regex, lark_regex
from server.text.parsers.argument_values import ALTERNATIVES, COMBINED, JSON_TYPES, STRING, ArgumentSchema, Schema
from server.text.parsers.nested_tags import ITEM, namespace_of
from server.text.parsers.tool_formats import KEY, LiteralArguments, TaggedArguments

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EMPTY = '""'
NAME_REGEX = "[a-zA-Z_][a-zA-Z0-9_]*"  # of parameters that the schema does not name
DEFINITIONS = ("$defs", "definitions")
MAX_DEPTH = 16  # of alternatives within alternatives
WHOLE = "x-arguments"
_DEFINITION = re.compile(rf"#/({'|'.join(map(re.escape, DEFINITIONS))})/([^/]*)(/.*)?")
# Keys of objects and arrays that no sequence of parameters can follow.
UNSUPPORTED = frozenset(
    (
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "not", "if", "prefixItems"),
        *("contains", "dependencies", "dependentRequired", "dependentSchemas"),
    )
)


class UnsupportedSchemaError(ValueError):
    """A schema that calls in the model's format cannot follow. The message may be shown to clients."""


@dataclass(frozen=True, slots=True)
class _Property:
    """A property of an object: its name, None for any other name, with its schema."""

    name: str | None
    schema: Any
    is_required: bool = False


@dataclass(slots=True)
class ArgumentGrammar:
    """Writes the rules of one tool's arguments.

    Attributes:
        prefix: what the names of all rules begin with.
        syntax: how the arguments are written.
        schema: the JSON schema of the arguments.
        rules: the rules written so far.
    """

    prefix: str
    syntax: TaggedArguments | LiteralArguments
    schema: ArgumentSchema
    markers: MarkerWriter
    rules: list[str] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)  # of rules, by what they stand for
    _num_chars: int = 0  # of the rules

    def write(self) -> str:
        """Return the expression of all arguments, without the text before and after them."""
        alternatives = [self._members(each, self._argument) for each in self._objects(self.schema.root)]
        return f"({' | '.join(alternatives)})"

    # Objects: alternatives of properties.

    def _objects(self, schema: Any, depth: int = 0) -> list[list[_Property]]:
        """Return the alternative lists of properties of the objects that a schema allows."""
        schema = self.schema.resolve(schema)
        _check_depth(depth)
        if unsupported := sorted(UNSUPPORTED & schema.keys()):
            raise UnsupportedSchemaError(f"'{unsupported[0]}' is not supported in this model's format of tool calls")
        for name in COMBINED:
            if name in schema:
                others = {key: value for key, value in schema.items() if key != name}
                parts = [self.schema.resolve(part) for part in schema[name]]
                if name == "allOf":
                    return self._objects(_merge([others, *parts]), depth + 1)
                return [
                    properties
                    for part in parts
                    if "object" in self.schema.types(part)
                    for properties in self._objects(_merge([others, part]), depth + 1)
                ]
        required = schema.get("required") or ()
        declared: dict[str, Any] = dict(schema.get("properties") or {})
        more = schema.get("additionalProperties", True)
        undeclared = {name: more for name in required if name not in declared}
        if more is False and undeclared:
            raise UnsupportedSchemaError(f"the required property {next(iter(undeclared))!r} is not allowed")
        properties = [
            _Property(name, value, name in required)
            for name, value in (declared | undeclared).items()
            if value is not False or name in required
        ]
        return [properties + ([_Property(None, more)] if more is not False else [])]

    def _members(self, properties: Sequence[_Property], write: Callable[[_Property, str], str]) -> str:
        """Return the expression of the properties in their order. `write` returns that of one."""
        names = "|".join(escape_regex(each.name) for each in properties if each.name is not None)
        any_name = f"/{NAME_REGEX}/" + (f" & ~/({names})/" if names else "")
        separator = self.syntax.separator if isinstance(self.syntax, LiteralArguments) else ""
        rest = self._rule("", "end")  # of what may follow when no property was written, and when one was
        first = rest
        for each in reversed(properties):
            member = self._rule(write(each, any_name))
            after = f"{literal(separator)} {member}" if separator else member
            if each.name is None:
                first, rest = self._rule(f"{EMPTY} | {member} ({after})*"), self._rule(f"({after})*")
                continue
            optional = "" if each.is_required else " | {}"
            first, rest = (
                self._rule(f"{member} {rest}" + optional.format(first)),
                self._rule(f"{after} {rest}" + optional.format(rest)),
            )
        return first

    # Arguments and members.

    def _argument(self, each: _Property, any_name: str) -> str:
        if isinstance(self.syntax, LiteralArguments):
            return self._pair(each, any_name, self.syntax.after_key)
        key = self._key(each, any_name)
        text = self.syntax.before_key.replace(KEY, "")
        before, end = self.markers.write(text) if text else "", self.syntax.after_value
        if self.syntax.is_nested:
            return self._element(each, any_name)
        if self.syntax.after_keys:
            return f"{before} {key} ({' | '.join(self._typed_values(each.schema, self.syntax, end))})"
        return f"{before} {key} {self.markers.write(self.syntax.after_key)} {self._text_value(each.schema, end)}"

    def _typed_values(self, schema: Any, syntax: TaggedArguments, end: str) -> Iterator[str]:
        """Yield the values of each type with the text before them, which tells the type."""
        types = self.schema.types(schema)
        for kind, after_key in syntax.after_keys.items():
            names = frozenset(("integer", "number")) if kind == "number" else frozenset((kind,))
            if not names & types:
                continue
            narrowed = self._narrow(schema, names)
            value = (
                self._text(narrowed, end) if kind == "string" else f"{self._json(narrowed)} {self.markers.write(end)}"
            )
            yield f"{self.markers.write(after_key)} {value}"

    def _pair(self, each: _Property, any_name: str, after_key: str) -> str:
        return f"{self._key(each, any_name)} {literal(after_key)} {self._literal(each.schema)}"

    def _element(self, each: _Property, any_name: str) -> str:
        """Return the expression of a value between tags with its name, which holds tags in turn."""
        assert isinstance(self.syntax, TaggedArguments)
        if each.name is None:
            raise UnsupportedSchemaError("further properties are not supported in this model's format of tool calls")
        before = self.syntax.before_key + each.name + self.syntax.after_key
        end = self.syntax.after_value.replace(KEY, each.name)
        return f"{self.markers.write(before)} {self._nested(each.schema, end)}"

    def _key(self, each: _Property, any_name: str) -> str:
        if each.name is None:
            return self._terminal(any_name)
        if not each.name or any(char in "<>\"'=:,(){}/\n" for char in each.name) or each.name != each.name.strip():
            raise UnsupportedSchemaError(
                f"the name {each.name!r} is not supported in this model's format of tool calls"
            )
        return literal(each.name)

    # Values.

    def _text_value(self, schema: Any, end: str) -> str:
        """Return the expression of a value that stands in the text as it is, if it is a string, up to `end`."""
        types = self.schema.types(schema)
        if types == STRING:
            return self._text(schema, end)
        if types == JSON_TYPES:  # any text is a value
            return self._text({}, end)
        others = types - STRING
        json_value = f"{self._json(self._narrow(schema, others))} {self.markers.write(end)}" if others else ""
        if "string" not in types:
            return json_value
        # A string must not look like a value of another type.
        text = self._text(self._narrow(schema, STRING), end, r" & /[^\[\]{}\"0-9tfnTFN \t\r\n\-](.|\n)*/")
        return f"({json_value} | {text})"

    def _nested(self, schema: Any, end: str) -> str:
        """Return the name of the rule of a value whose members and items are tags, up to `end`."""
        return self._named(f"nested {end} {json.dumps(schema)}", lambda: self._write_nested(schema, end))

    def _write_nested(self, schema: Any, end: str) -> str:
        types = self.schema.types(schema)
        if not types & {"object", "array"} or types == JSON_TYPES:
            return self._text_value(schema, end)
        assert isinstance(self.syntax, TaggedArguments)
        namespace = namespace_of(self.syntax)
        alternatives = []
        if "object" in types:
            objects = self._objects(self._narrow(schema, frozenset(("object",))))
            write = self._nested_member(namespace)
            alternatives += [self._members(each, write) for each in objects]
        if "array" in types and "object" not in types:
            narrowed = self.schema.resolve(schema)
            item = self._rule(self._nested_item(namespace, narrowed.get("items", {})))
            alternatives.append(f"{item}{_times(narrowed)}")
        if types - {"object", "array"}:
            raise UnsupportedSchemaError(
                "values of several types are not supported in this model's format of tool calls"
            )
        return f"({' | '.join(alternatives)}) {self.markers.write(end)}"

    def _nested_member(self, namespace: str) -> Callable[[_Property, str], str]:
        def write(each: _Property, any_name: str) -> str:
            if each.name is None:
                raise UnsupportedSchemaError(
                    "further properties are not supported in this model's format of tool calls"
                )
            value = self._nested(each.schema, f"{namespace}</{each.name}>")
            return f"{self.markers.write(f'{namespace}<{each.name}>')} {value}"

        return write

    def _nested_item(self, namespace: str, schema: Any) -> str:
        return f"{self.markers.write(f'{namespace}<{ITEM}>')} {self._nested(schema, f'{namespace}</{ITEM}>')}"

    def _literal(self, schema: Any) -> str:
        """Return the name of the rule of a value as a literal."""
        return self._named(f"literal {json.dumps(schema)}", lambda: " | ".join(self._literals(schema)))

    def _literals(self, schema: Any) -> Iterator[str]:
        assert isinstance(self.syntax, LiteralArguments)
        types = self.schema.types(schema)
        words = zip(("true", "false", "null"), self.syntax.words, (True, False, None), strict=True)
        if self.syntax.has_escapes:  # strings, arrays and objects are literals as they are in JSON
            if others := types - {"boolean", "null"}:
                yield self._json(self._narrow(schema, others))
        else:
            if "string" in types:
                quote = self.syntax.quotes[0]
                yield f"{self.markers.write(quote)} {self._text(self._narrow(schema, STRING), quote)}"
            if numbers := types & {"integer", "number"}:
                yield self._json(self._narrow(schema, numbers))
            if "array" in types:
                yield self._literal_array(self._narrow(schema, frozenset(("array",))))
            if "object" in types:
                for each in self._objects(self._narrow(schema, frozenset(("object",)))):
                    yield f'"{{" {self._members(each, lambda one, name: self._pair(one, name, ":"))} "}}"'
        allowed = _listed_values(self.schema.resolve(schema))
        for json_word, word, value in words:
            kind = "null" if json_word == "null" else "boolean"
            if kind in types and (allowed is None or any(each is value for each in allowed)):
                yield literal(word)

    def _literal_array(self, schema: Schema) -> str:
        assert isinstance(self.syntax, LiteralArguments)
        item = self._literal(schema.get("items", {}))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        more = f"({literal(self.syntax.separator)} {item})" + _times(
            {"minItems": max(least - 1, 0)} | ({} if most is None else {"maxItems": most - 1})
        )
        return f'"[" {item} {more} "]"' + ("" if least else ' | "[]"')

    def _json(self, schema: Any) -> str:
        """Return the name of the rule of a value as JSON."""
        value = {**self.schema.resolve(schema), "x-guidance": SPACING}
        return self._rule(f"%json {json.dumps(_relocate({**self._definitions(value), **value}))}")

    def _definitions(self, schema: Schema) -> dict[str, dict[str, Any]]:
        """Return the definitions that a schema refers to, also by way of others.

        What else it refers to is a part of the definition `WHOLE`, the schema of all arguments.
        """
        found = defaultdict[str, dict[str, Any]](dict)
        pending: list[Any] = [schema]
        while pending:
            value = pending.pop()
            if isinstance(value, dict) and isinstance(reference := value.get("$ref"), str):
                path = _DEFINITION.fullmatch(reference)
                key, name = (path[1], _unescape(path[2])) if path else (DEFINITIONS[0], WHOLE)
                target = self.schema.resolve({"$ref": f"#/{path[1]}/{path[2]}"}) if path else self.schema.root
                if name not in found[key]:
                    found[key][name] = target
                    pending.append(target)
            pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return found

    def _text(self, schema: Any, end: str, restriction: str = "") -> str:
        """Return the name of the rule of a string as it is, up to and including `end`."""
        schema = self.schema.resolve(schema)
        marker = end.strip()
        if (values := _listed_values(schema)) is not None:
            texts = [each for each in values if isinstance(each, str) and marker not in each]
            if not texts:
                raise UnsupportedSchemaError("none of the values of 'enum' can be written in this model's format")
            return self._rule(f"({' | '.join(map(literal, texts))}) {self.markers.write(end)}")
        text = "".join(
            [
                f"/{_length_regex(schema)}/",
                "" if "pattern" not in schema else f" & {lark_regex(_search_regex(schema['pattern']))}",
                self.markers.without(marker, anywhere=True),
                restriction,
            ]
        )
        key = f"text {text} {end}"
        if key not in self._names:
            self._names[key] = name = f"{self.prefix}_{len(self._names)}"
            self._add(f"{name.upper()}_TEXT: {text}")
            self._add(self.markers.up_to(name, f"{name.upper()}_TEXT", end))
        return self._names[key]

    # Helpers.

    def _add(self, rule: str) -> None:
        """Add a rule. Raises UnsupportedSchemaError if the grammar becomes larger than the engine accepts."""
        self.rules.append(rule)
        self._num_chars += len(rule)
        if self._num_chars > MAX_GRAMMAR_BYTES:
            raise UnsupportedSchemaError(f"its grammar would be larger than {MAX_GRAMMAR_BYTES} bytes")

    def _named(self, key: str, write: Callable[[], str]) -> str:
        """Return the name of the rule with this key. `write` returns its body, which may refer to the rule itself."""
        if key not in self._names:
            self._names[key] = f"{self.prefix}_{len(self._names)}"
            self._add(f"{self._names[key]}: {write()}")
        return self._names[key]

    def _rule(self, body: str, name: str = "") -> str:
        """Return the name of a rule with this body, which is added once however often it is used."""
        key = f"rule {body}"
        if key not in self._names:
            self._names[key] = f"{self.prefix}_{name}{len(self._names)}"
            self._add(f"{self._names[key]}: {body or EMPTY}")
        return self._names[key]

    def _terminal(self, body: str) -> str:
        key = f"terminal {body}"
        if key not in self._names:
            self._names[key] = f"{self.prefix.upper()}_{len(self._names)}"
            self._add(f"{self._names[key]}: {body}")
        return self._names[key]

    def _narrow(self, original: Any, types: frozenset[str], depth: int = 0) -> dict[str, Any]:
        """Return the schema restricted to some types."""
        _check_depth(depth)
        schema = dict(self.schema.resolve(original))
        for name in ALTERNATIVES:
            if name in schema:
                choices = [each for each in schema[name] if self.schema.types(each) & types]
                schema[name] = [self._narrow(each, types, depth + 1) for each in choices]
                if len(choices) == 1:
                    schema |= schema.pop(name)[0]
        if (values := schema.get("enum")) is not None:
            schema["enum"] = [each for each in values if self.schema.types({"const": each}) & types]
        if not any(name in schema for name in (*COMBINED, "enum", "const")):
            kept = self.schema.types(schema) & types
            kept = kept - {"integer"} if "number" in kept else kept
            schema["type"] = sorted(kept) if len(kept) != 1 else next(iter(kept))
        return schema


def _relocate(schema: Any) -> Any:
    """Return a schema whose references to anything but definitions lead into the definition `WHOLE`."""
    if isinstance(schema, list):
        return list(map(_relocate, schema))
    if not isinstance(schema, dict):
        return schema
    result = {name: _relocate(value) for name, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and not _DEFINITION.fullmatch(reference):
        result["$ref"] = f"#/{DEFINITIONS[0]}/{WHOLE}{reference.removeprefix('#')}"
    return result


def _unescape(name: str) -> str:
    """Return a name as a JSON pointer stands for it."""
    return name.replace("~1", "/").replace("~0", "~")


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UnsupportedSchemaError(f"alternatives are nested more than {MAX_DEPTH} deep, or refer to themselves")


def _merge(schemas: Sequence[Schema]) -> dict[str, Any]:
    """Return a schema of objects that has the keys of several schemas."""
    merged: dict[str, Any] = {}
    for schema in schemas:
        for name, value in schema.items():
            if name == "properties":
                merged[name] = merged.get(name, {}) | value
            elif name == "required":
                merged[name] = [*merged.get(name, []), *value]
            elif name == "additionalProperties" and name in merged:
                merged[name] = False if False in (value, merged[name]) else value
            else:
                merged[name] = value
    return merged


def _listed_values(schema: Schema) -> list[Any] | None:
    """Return the values that a schema lists, or None if it lists none."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _times(schema: Schema) -> str:
    """Return the repetition of an item: `{1,3}`."""
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    return f"{{{least},{'' if most is None else most}}}"


def _length_regex(schema: Schema) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    return ANYTHING if not least and most is None else f"(.|\\n){{{least},{'' if most is None else most}}}"


def _search_regex(pattern: str) -> str:
    """Return a regular expression for whole texts that contain a match of the pattern."""
    before = "" if pattern.startswith("^") else ANYTHING
    is_end = pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern.removeprefix("^")
    return f"{before}({inner[:-1] if is_end else inner}){'' if is_end else ANYTHING}"
