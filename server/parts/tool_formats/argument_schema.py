"""The schema of a tool's arguments, by which formats that write values as plain text are converted to JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from server.text.parsers.tool_formats import Schema

JSON_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
STRING = frozenset(("string",))
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
MAX_REFERENCES = 16  # `$ref` that refer to one another
MAX_STEPS = 4000  # some milliseconds
MAX_REFERENCE_CHARS = 1000
ALTERNATIVES = ("anyOf", "oneOf")
COMBINED = (*ALTERNATIVES, "allOf")
ANYTHING: Schema = {}


class ArgumentSchema:
    """The JSON schema of a tool's arguments, which says of what types they are.

    Each part is looked at once, however many references lead to it, and no more than `max_steps` keys and values are:
    parsers ask on the event loop, about schemas of clients. Beyond that, a value may be of any type. So the choices of
    a request share one.
    """

    def __init__(self, root: Schema, max_steps: float = MAX_STEPS) -> None:
        self.root = root
        self._num_steps_left = max_steps
        # By the ids of schemas, which stay alive with what is known of them.
        self._resolved: dict[int, tuple[Schema, Schema]] = {}
        self._types: dict[int, tuple[Schema, frozenset[str]]] = {}
        self._targets: dict[str, Any] = {}  # of references

    def resolve(self, schema: Any) -> Schema:
        """Return a schema with its `$ref` replaced by what it refers to, or {} if there is nothing."""
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema if isinstance(schema, Mapping) else ANYTHING
        if id(schema) not in self._resolved:
            self._resolved[id(schema)] = (schema, self._follow_all(schema))
        return self._resolved[id(schema)][1]

    def types(self, schema: Any, depth: int = 0) -> frozenset[str]:
        """Return the JSON types of the values that a schema allows; all of them if it does not say."""
        schema = self.resolve(schema)
        if depth > MAX_REFERENCES:
            return JSON_TYPES
        if id(schema) not in self._types:
            self._types[id(schema)] = (schema, JSON_TYPES)  # for a schema that refers to itself
            self._types[id(schema)] = (schema, self._find_types(schema, depth + 1))
        return self._types[id(schema)][1]

    def parameter_types(self, name: str) -> frozenset[str]:
        """Return the types of the argument with this name."""
        schemas = self._parameters.get(name) or self._others
        return frozenset().union(*map(self.types, schemas)) if schemas else JSON_TYPES

    @cached_property
    def _parameters(self) -> Mapping[str, Sequence[Any]]:
        """The schemas of each argument that is declared."""
        found: dict[str, list[Any]] = {}
        for part in self._parts:
            properties = part.get("properties")
            if isinstance(properties, Mapping) and self._take(len(properties)):
                for name, schema in properties.items():
                    found.setdefault(name, []).append(schema)
        return found

    @cached_property
    def _others(self) -> Sequence[Any]:
        """The schemas of arguments that are not declared."""
        return [part["additionalProperties"] for part in self._parts if "additionalProperties" in part]

    @cached_property
    def _parts(self) -> Sequence[Schema]:
        """The schema of all arguments and those that it combines."""
        parts: dict[int, Schema] = {}
        pending: list[Any] = [self.root]
        while pending:
            part = self.resolve(pending.pop())
            if id(part) not in parts and self._take(1):
                parts[id(part)] = part
                pending += [each for name in COMBINED for each in self._list(part, name)]
        return list(parts.values())

    def _find_types(self, schema: Schema, depth: int) -> frozenset[str]:
        types = JSON_TYPES
        if kinds := [kind] if isinstance(kind := schema.get("type"), str) else self._list(schema, "type"):
            types &= frozenset(filter(_is_text, kinds))
        if values := self._list(schema, "enum"):
            types &= frozenset().union(*map(_types_of, values))
        if "const" in schema:
            types &= _types_of(schema["const"])
        for name in ALTERNATIVES:
            if choices := self._list(schema, name):
                types &= frozenset().union(*(self.types(choice, depth) for choice in choices))
        for part in self._list(schema, "allOf"):
            types &= self.types(part, depth)
        return types

    def _follow_all(self, schema: Any) -> Schema:
        """Return what a chain of references leads to, with the keys beside each `$ref` in place of what it has."""
        beside: list[Schema] = []
        for _ in range(MAX_REFERENCES):
            if not isinstance(schema, Mapping):
                return ANYTHING
            if not isinstance(reference := schema.get("$ref"), str):
                break
            beside.append({name: value for name, value in schema.items() if name != "$ref"})
            schema = self._follow(reference)
        else:
            return ANYTHING
        target: Schema = schema
        for others in filter(None, reversed(beside)):
            if not self._take(len(target) + len(others)):
                return ANYTHING
            target = {**target, **others}
        return target

    def _follow(self, reference: str) -> Any:
        """Return what a JSON pointer refers to."""
        if len(reference) > MAX_REFERENCE_CHARS:
            return None
        if reference not in self._targets:
            self._targets[reference] = self._walk(reference)
        return self._targets[reference]

    def _walk(self, reference: str) -> Any:
        value: Any = self.root
        for name in reference.removeprefix("#").split("/")[1:]:
            key = name.replace("~1", "/").replace("~0", "~")
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def _list(self, schema: Schema, name: str) -> list[Any]:
        """Return the elements at a key; none if there are too many."""
        value = schema.get(name)
        return value if isinstance(value, list) and self._take(len(value)) else []

    def _take(self, num_steps: int) -> bool:
        """Count steps; return whether they may be made."""
        self._num_steps_left -= num_steps
        return self._num_steps_left >= 0


def to_json(text: str, types: frozenset[str]) -> str:
    """Return a value as JSON. Text that is no value of one of the types is a string."""
    stripped = text.strip()
    if "number" in types and NUMBER.fullmatch(stripped):  # perhaps beyond the range of floats
        return stripped
    value = _decode(stripped)
    if value is not msgspec.UNSET and not isinstance(value, str) and _types_of(value) & types:
        is_whole = isinstance(value, float) and "number" not in types
        return str(int(value)) if is_whole else stripped
    if (word := stripped.lower()) in ("true", "false") and "boolean" in types and "string" not in types:
        return word
    if stripped in ("None", "NULL", "Null") and "null" in types and "string" not in types:
        return "null"
    return json.dumps(text, ensure_ascii=False)


def _decode(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):  # msgspec's errors and those about lone surrogates are ValueErrors
        return msgspec.UNSET


def _types_of(value: Any) -> frozenset[str]:
    """Return the JSON types of a value."""
    match value:
        case None:
            return frozenset(("null",))
        case bool():
            return frozenset(("boolean",))
        case int():
            return frozenset(("integer", "number"))
        case float():
            return frozenset(("integer", "number") if value.is_integer() else ("number",))
        case str():
            return STRING
        case list():
            return frozenset(("array",))
    return frozenset(("object",))


def _is_text(value: object) -> bool:
    return isinstance(value, str)
