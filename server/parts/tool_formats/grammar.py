"""The grammar of a tool's arguments that are not one JSON object: values between tags, or literals of a language.

Arguments are written in the order of the schema's properties. Strings stand as they are in the text, so their schema
becomes a regular expression; other values follow their schema as JSON where the format writes JSON.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.grammar.compiler import MAX_GRAMMAR_BYTES
from server.constrained.json_schema import lark_regex
from server.parts.tool_formats.argument_schema import ALTERNATIVES, COMBINED, ArgumentSchema
from server.text.parsers.markers import ANYTHING, MarkerWriter, escape_regex, literal
from server.text.parsers.tool_formats import SPACING, Schema, UnsupportedSchemaError

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


@dataclass(frozen=True, slots=True)
class Property:
    """A property of an object: its name, None for any other name, with its schema."""

    name: str | None
    schema: Any
    is_required: bool = False


class ArgumentGrammar(ABC):
    """Writes the rules of one tool's arguments."""

    def __init__(self, name: str, schema: Schema, markers: MarkerWriter, separator: str = "") -> None:
        """`name` is that of the rule of all arguments, and the beginning of the others' names."""
        self.schema = ArgumentSchema(schema, math.inf)
        self.markers = markers
        self._name = name
        self._separator = separator  # between arguments
        self._rules: list[str] = []
        self._names: dict[str, str] = {}  # of rules, by what they stand for
        self._num_chars = 0  # of the rules

    def write(self) -> list[str]:
        """Return the rules. Raises UnsupportedSchemaError."""
        alternatives = [self.members(each, self.argument) for each in self.objects(self.schema.root)]
        return [f"{self._name}: ({' | '.join(alternatives)})", *self._rules]

    @abstractmethod
    def argument(self, each: Property, any_name: str) -> str:
        """Return the expression of an argument. `any_name` is that of a name that the schema does not have."""

    # Objects: alternatives of properties.

    def objects(self, schema: Any, depth: int = 0) -> list[list[Property]]:
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
                    return self.objects(_merge([others, *parts]), depth + 1)
                return [
                    properties
                    for part in parts
                    if "object" in self.schema.types(part)
                    for properties in self.objects(_merge([others, part]), depth + 1)
                ]
        required = schema.get("required") or ()
        declared: dict[str, Any] = dict(schema.get("properties") or {})
        more = schema.get("additionalProperties", True)
        undeclared = {name: more for name in required if name not in declared}
        if more is False and undeclared:
            raise UnsupportedSchemaError(f"the required property {next(iter(undeclared))!r} is not allowed")
        properties = [
            Property(name, value, name in required)
            for name, value in (declared | undeclared).items()
            if value is not False or name in required
        ]
        return [properties + ([Property(None, more)] if more is not False else [])]

    def members(self, properties: Sequence[Property], write: Callable[[Property, str], str]) -> str:
        """Return the expression of the properties in their order. `write` returns that of one."""
        names = "|".join(escape_regex(each.name) for each in properties if each.name is not None)
        any_name = f"/{NAME_REGEX}/" + (f" & ~/({names})/" if names else "")
        rest = self.rule("", "end")  # of what may follow when no property was written, and when one was
        first = rest
        for each in reversed(properties):
            member = self.rule(write(each, any_name))
            after = f"{literal(self._separator)} {member}" if self._separator else member
            if each.name is None:
                first, rest = self.rule(f"{EMPTY} | {member} ({after})*"), self.rule(f"({after})*")
                continue
            optional = "" if each.is_required else " | {}"
            first, rest = (
                self.rule(f"{member} {rest}" + optional.format(first)),
                self.rule(f"{after} {rest}" + optional.format(rest)),
            )
        return first

    def key(self, each: Property, any_name: str) -> str:
        if each.name is None:
            return self._terminal(any_name)
        if not each.name or any(char in "<>\"'=:,(){}/\n" for char in each.name) or each.name != each.name.strip():
            raise UnsupportedSchemaError(
                f"the name {each.name!r} is not supported in this model's format of tool calls"
            )
        return literal(each.name)

    def json(self, schema: Any) -> str:
        """Return the name of the rule of a value as JSON."""
        value = {**self.schema.resolve(schema), "x-guidance": SPACING}
        return self.rule(f"%json {json.dumps(_relocate({**self._definitions(value), **value}))}")

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

    def text(self, schema: Any, end: str, restriction: str = "") -> str:
        """Return the name of the rule of a string as it is, up to and including `end`."""
        schema = self.schema.resolve(schema)
        marker = end.strip()
        if (values := listed_values(schema)) is not None:
            texts = [each for each in values if isinstance(each, str) and marker not in each]
            if not texts:
                raise UnsupportedSchemaError("none of the values of 'enum' can be written in this model's format")
            return self.rule(f"({' | '.join(map(literal, texts))}) {self.markers.write(end)}")
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
            self._names[key] = name = f"{self._name}_{len(self._names)}"
            self._add(f"{name.upper()}_TEXT: {text}")
            self._add(self.markers.up_to(name, f"{name.upper()}_TEXT", end))
        return self._names[key]

    # Helpers.

    def _add(self, rule: str) -> None:
        """Add a rule. Raises UnsupportedSchemaError if the grammar becomes larger than the engine accepts."""
        self._rules.append(rule)
        self._num_chars += len(rule)
        if self._num_chars > MAX_GRAMMAR_BYTES:
            raise UnsupportedSchemaError(f"its grammar would be larger than {MAX_GRAMMAR_BYTES} bytes")

    def named(self, key: str, write: Callable[[], str], prefix: str = "") -> str:
        """Return the name of the rule with this key. `write` returns its body, which may refer to the rule itself."""
        if key not in self._names:
            self._names[key] = f"{self._name}_{prefix}{len(self._names)}"
            self._add(f"{self._names[key]}: {write()}")
        return self._names[key]

    def rule(self, body: str, prefix: str = "") -> str:
        """Return the name of a rule with this body, which is added once however often it is used."""
        return self.named(f"rule {body}", lambda: body or EMPTY, prefix)

    def _terminal(self, body: str) -> str:
        key = f"terminal {body}"
        if key not in self._names:
            self._names[key] = f"{self._name.upper()}_{len(self._names)}"
            self._add(f"{self._names[key]}: {body}")
        return self._names[key]

    def narrow(self, original: Any, types: frozenset[str], depth: int = 0) -> dict[str, Any]:
        """Return the schema restricted to some types."""
        _check_depth(depth)
        schema = dict(self.schema.resolve(original))
        for name in ALTERNATIVES:
            if name in schema:
                choices = [each for each in schema[name] if self.schema.types(each) & types]
                schema[name] = [self.narrow(each, types, depth + 1) for each in choices]
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


def listed_values(schema: Schema) -> list[Any] | None:
    """Return the values that a schema lists, or None if it lists none."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def times(schema: Schema) -> str:
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
