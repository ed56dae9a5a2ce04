"""Finds the objects of a JSON schema to close, so that they get no properties that the schema does not name.

JSON Schema allows further properties in every object whose schema has no `additionalProperties`. Schemas that are made
from classes rarely have that key and do not mean this, but models make use of it. A schema with `properties` is closed
if it alone says what its values are: nothing beside it, or beside a schema that it is in, combines it with others.
Then it remains satisfiable, and each answer is valid under the original schema, too.

In `oneOf`, a narrower alternative can make an answer valid that matched two of them. So these are closed only if their
types, or the strings that a property may have, tell them apart. That property, the tag, becomes required: it is
optional in schemas made from classes that have a default for it, such as pydantic's.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

# Keys whose value is a schema, a list of schemas, or an object of schemas by name.
SCHEMA_KEYS = frozenset(
    ("items", "additionalProperties", "additionalItems", "propertyNames", "not", "if", "then", "else", "contains")
)
SCHEMA_LIST_KEYS = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
SCHEMA_MAP_KEYS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

ANNOTATIONS = ("title", "description")

_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
# Keys that say more about the value of a schema, or about a part of it, than the keys of `_INNER`.
_COMBINED = {"anyOf", "oneOf", "allOf", "not", "if", "then", "else", "dependentSchemas", "dependencies", *_REFERENCES}
_COMBINED |= {"enum", "const", "contains"}
_INNER = {"properties", "patternProperties", "additionalProperties", "items", "prefixItems", "additionalItems"}
_OTHERS = {"unevaluatedProperties", "unevaluatedItems", "propertyNames", "dependentRequired"}
_CONSTRAINTS = _COMBINED | _INNER | _OTHERS | {"required", "minProperties", "maxProperties"}
_OPEN = _COMBINED | _OTHERS | {"patternProperties", "additionalProperties"}
_MAX_REFERENCES = 16  # in a chain of references

# Keys of a schema that a tag can be made required in, and of the schema of the tag: it must remain satisfiable.
_TAGGED = {"properties", "required", "additionalProperties"}
_TAG = {"type", "const", "enum", "default", "examples", *ANNOTATIONS}

Schema = Mapping[str, Any]
_EMPTY: Schema = {}


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What is to change in the schemas of a root; these are known by their ids (those of Python)."""

    closed: frozenset[int] = frozenset()  # schemas that get no further properties
    tags: Mapping[int, set[str]] = field(default_factory=dict)  # optional properties that become required


def find_narrowing(root: Schema) -> Narrowing:
    """Return which of the schemas in `root`, itself included, are to be closed, and which tags become required.

    Each schema is looked at once with others beside it, and once without.
    """
    closed: set[int] = set()
    tags: defaultdict[int, set[str]] = defaultdict(set)
    seen: set[tuple[int, bool]] = set()
    targets = _References(root)
    has_references = has_ids = False
    pending: list[tuple[Schema, bool]] = [(root, True)]  # schemas, and whether they alone say what their values are
    while pending:
        schema, is_alone = pending.pop()
        if (id(schema), is_alone) in seen:
            continue
        seen.add((id(schema), is_alone))
        if is_alone and _can_close(schema):
            closed.add(id(schema))
        alone = _alone_keys(schema) if is_alone else set()
        if "oneOf" in alone and not targets.tell_apart(schema, tags):
            alone = set()
        for key, part in _parts(schema):
            pending.append((part, key in alone))
        has_ids = has_ids or ("$id" in schema and schema is not root)
        if schema.keys() & _REFERENCES:
            has_references, target = True, targets.resolve(schema.get("$ref"))
            if target is None:
                return Narrowing()  # it may be any part of the schema
            pending.append((target, "$ref" in alone))
    constrained = {number for number, is_alone in seen if not is_alone}
    # A reference is relative to the id of the schema it is in. Alternatives are not distinct if a tag stays optional.
    if (has_references and has_ids) or tags.keys() & constrained:
        return Narrowing()
    return Narrowing(frozenset(closed - constrained), tags)


def _can_close(schema: Schema) -> bool:
    """Return whether a schema can be closed, given that it alone says what its values are."""
    names = _strings(schema.get("properties"))
    return "properties" in schema and not schema.keys() & _OPEN and names.issuperset(_strings(schema.get("required")))


def _alone_keys(schema: Schema) -> set[str]:
    """Return the keys whose schemas alone say what their values are, given that `schema` does so."""
    used = schema.keys() & _CONSTRAINTS
    if len(used) == 1 and used <= {"anyOf", "oneOf", "$ref"}:
        return used
    if used == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
        return used
    if used & _COMBINED:
        return set()
    return _INNER - ({"properties", "patternProperties"} if {"properties", "patternProperties"} <= used else set())


def _can_require(schema: Schema, name: str) -> bool:
    """Return whether a schema remains satisfiable if it requires the property, whose values are known strings."""
    required = schema.get("required", [])
    if not isinstance(required, list) or name in required:
        return isinstance(required, list)
    value = schema["properties"][name]
    has_strings = isinstance(value, Mapping) and value.keys() <= _TAG and _types(value) in (set(), {"string"})
    return has_strings and schema.keys() & _CONSTRAINTS <= _TAGGED and not {"const", "enum"} <= value.keys()


def _are_disjoint(sets: Sequence[Set[str]]) -> bool:
    """Return whether no element is in two of the sets. Empty ones stand for all elements."""
    union = set[str]()
    for each in sets:
        if not each or not union.isdisjoint(each):
            return False
        union |= each
    return True


def _types(schema: Schema) -> set[str]:
    types = schema.get("type")
    return {"number" if name == "integer" else name for name in _strings([types] if isinstance(types, str) else types)}


def _strings(names: object) -> set[str]:
    """Return the strings in an array, or the names of an object."""
    return {name for name in names if isinstance(name, str)} if isinstance(names, Mapping | list) else set()


def _parts(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the schemas directly within a schema, except definitions, with their keys. True and false are left out."""
    for key, value in schema.items():
        parts: list[Any] = []
        if key in SCHEMA_LIST_KEYS and isinstance(value, list):
            parts = value
        elif key in SCHEMA_KEYS:
            parts = [value]
        elif key in SCHEMA_MAP_KEYS and key not in ("$defs", "definitions") and isinstance(value, Mapping):
            parts = [*value.values()]
        yield from ((key, part) for part in parts if isinstance(part, Mapping))


class _References:
    """What references in a root schema lead to."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._found: dict[str, Schema | None] = {}

    def resolve(self, reference: object) -> Schema | None:
        """Return the schema that a JSON pointer refers to; None if it is none, or if the reference is not a pointer."""
        if not isinstance(reference, str):
            return None
        if reference not in self._found:
            self._found[reference] = self._walk(reference)
        return self._found[reference]

    def tell_apart(self, schema: Schema, tags: defaultdict[int, set[str]]) -> bool:
        """Return whether no value matches two alternatives of `oneOf`, as far as types and a property, the tag, show.

        Adds the tag to `tags` for the alternatives in which it is optional. True and false stand as empty schemas.
        """
        parts = schema["oneOf"] if isinstance(schema["oneOf"], list) else []
        alternatives = [self._follow(part) for part in parts]
        objects = [each for each in alternatives if _types(each) == {"object"}]
        types = [names for each in alternatives if (names := _types(each)) != {"object"}]
        if not _are_disjoint(types + [{"object"}] * bool(objects)):
            return False
        tag = self._find_tag(objects) if len(objects) > 1 else ""
        if tag:
            for each in objects:
                if tag not in _strings(each.get("required")):
                    tags[id(each)].add(tag)
        return tag is not None

    def _find_tag(self, objects: Sequence[Schema]) -> str | None:
        """Return a property whose strings tell objects apart: one that all require, or else that all can require."""
        if len(set(map(id, objects))) < len(objects):
            return None
        required = set.intersection(*(_strings(schema.get("required")) for schema in objects))
        fixed = [self._fixed_properties(schema) for schema in objects]
        names = set[str].intersection(*map(set[str], fixed))
        for name in [*sorted(required & names), *sorted(names - required)]:
            if _are_disjoint([strings[name] for strings in fixed]) and (
                name in required or all(_can_require(schema, name) for schema in objects)
            ):
                return name
        return None

    def _fixed_properties(self, schema: Schema) -> dict[str, set[str]]:
        """Return the properties that must be one of certain strings, with these."""
        properties = schema.get("properties")
        found: dict[str, set[str]] = {}
        for name, part in properties.items() if isinstance(properties, Mapping) else ():
            value = self._follow(part)
            values = [value["const"]] if "const" in value else value.get("enum")
            if isinstance(values, list) and values and all(isinstance(each, str) for each in values):
                found[name] = set(values)
        return found

    def _follow(self, schema: object) -> Schema:
        for _ in range(_MAX_REFERENCES):
            if not isinstance(schema, Mapping):
                return _EMPTY
            if "$ref" not in schema:
                return schema
            schema = self.resolve(schema["$ref"])
        return _EMPTY

    def _walk(self, reference: str) -> Schema | None:
        if not re.fullmatch("#(/.{0,1000})?", reference):
            return None
        value: object = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and re.fullmatch("[0-9]{1,5}", name):
                value = value[int(name)] if int(name) < len(value) else None
            elif isinstance(value, Mapping):
                value = value.get(name)
            else:
                return None
        return value if isinstance(value, Mapping) else None
