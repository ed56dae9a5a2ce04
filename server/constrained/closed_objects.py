"""Finds the objects of a JSON schema to close, so that they get no properties that the schema does not name.

JSON Schema allows further properties in every object whose schema has no `additionalProperties`. Schemas that are made
from classes rarely have that key and do not mean this, but models make use of it. A schema with `properties` is closed
if it remains satisfiable, and if each answer is valid under the original schema, too:

* Nothing else may name properties of the same object. So schemas stay open beside `allOf`, `$ref`, `patternProperties`
  and the like, and where they are combined with others. The alternatives of `anyOf` and `oneOf` are closed unless there
  are `properties` beside them; these are closed if the alternatives name no others.
* In `oneOf`, a narrower alternative can make an answer valid that matched two of them. So these are closed only if
  their types, or the strings that a property may have, tell them apart. That property, the tag, becomes required: it
  is optional in schemas made from classes that have a default for it, such as pydantic's.
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

# Keys whose schemas apply to the same value as the schema with the key, and those whose schemas apply to parts of it.
_ALTERNATIVES = {"anyOf", "oneOf"}
_COMBINED = {"allOf", "not", "if", "then", "else", "dependentSchemas", "dependencies"}
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_INNER = {"properties", "patternProperties", "additionalProperties", "items", "prefixItems", "additionalItems"}
# Keys that say more about an object's properties than `properties` and `required`, or list its values.
_OTHERS = {"patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames", "dependentRequired"}
_FIXED = {"enum", "const"}
_CONSTRAINTS = _ALTERNATIVES | _COMBINED | _REFERENCES | _INNER | _OTHERS | _FIXED
_CONSTRAINTS |= {"required", "minProperties", "maxProperties", "contains", "unevaluatedItems"}
_NAMED = {"properties", "required"}
_DEFINITIONS = {"$defs", "definitions"}  # apply where a reference leads to them
_MAX_REFERENCES = 16  # in a chain of references

# Keys of a schema that a tag can be made required in, and of the schema of the tag: it must remain satisfiable.
_TAGGED = {"properties", "required", "additionalProperties"}
_TAG = {"type", "const", "enum", "default", "examples", *ANNOTATIONS}

Schema = Mapping[str, Any]
_EMPTY: Schema = {}  # one object, as schemas are known by their ids


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What is to change in the schemas of a root; these are known by their ids (those of Python)."""

    closed: frozenset[int] = frozenset()  # schemas that get no further properties
    tags: Mapping[int, set[str]] = field(default_factory=dict)  # optional properties that become required


def find_narrowing(root: Schema) -> Narrowing:
    """Return which of the schemas in `root`, itself included, are to be closed, and which tags become required."""
    return _Search(root).run()


class _Search:
    """A search in a root schema, which looks at each schema and follows each reference once."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._targets: dict[str, Schema | None] = {}  # of references
        self._tags: dict[int, str | None] = {}  # of the alternatives of `oneOf`, by the id of their schema
        self._properties: dict[int, dict[str, frozenset[str]]] = {}  # `_fixed_properties` by the id of the schema
        self._strings: dict[int, frozenset[str]] = {}  # of which a value must be one, by the id of its schema

    def run(self) -> Narrowing:
        closed: set[int] = set()
        tags: defaultdict[int, set[str]] = defaultdict(set)
        seen: set[tuple[int, bool]] = set()
        has_references = has_ids = False
        pending = [(self._root, True)]  # schemas, and whether nothing else constrains the same values
        while pending:
            schema, is_alone = pending.pop()
            if (id(schema), is_alone) in seen:
                continue
            seen.add((id(schema), is_alone))
            if is_alone and _can_close(schema):
                closed.add(id(schema))
            for number, tag in self._optional_tags(schema) if is_alone else ():
                tags[number].add(tag)
            for key, parts in _parts(schema):
                are_alone = is_alone and self._are_alone(key, schema)
                pending += [(part, are_alone) for part in parts]
            has_ids = has_ids or ("$id" in schema and schema is not self._root)
            if schema.keys() & _REFERENCES:
                has_references, target = True, self._resolve(schema.get("$ref"))
                if target is None:
                    return Narrowing()  # it may be any part of the schema
                pending.append((target, is_alone and self._are_alone("$ref", schema)))
        constrained = {number for number, is_alone in seen if not is_alone}
        # A reference is relative to the id of the schema it is in. Alternatives are not distinct if a tag stays
        # optional.
        if (has_references and has_ids) or tags.keys() & constrained:
            return Narrowing()
        return Narrowing(frozenset(closed - constrained), tags)

    def _are_alone(self, key: str, schema: Schema) -> bool:
        """Return whether the schemas at `key` alone constrain their values, given that `schema` does so."""
        others = schema.keys() & _CONSTRAINTS - {key}
        match key:
            case "anyOf" | "$ref":
                return not others
            case "allOf":
                return not others and len(schema[key]) == 1
            case "oneOf":
                return not others and self._are_distinct(schema)
            case "properties" | "patternProperties":
                others &= _COMBINED | _REFERENCES | _FIXED | {"properties", "patternProperties"}
            case _:
                others &= _COMBINED | _REFERENCES | _FIXED | {"contains"}
        has_only_required = all(part.keys() & _CONSTRAINTS <= {"required"} for part in _alternatives(schema))
        return key in _INNER and not others and has_only_required

    def _are_distinct(self, schema: Schema) -> bool:
        """Return whether no value matches two alternatives of `oneOf`, as far as types and the strings of a property
        show.

        The property may be one that `_optional_tags` makes required.
        """
        types = [_types(self._follow(part)) for part in _alternatives(schema)]
        objects = self._objects(schema)
        if not _are_disjoint([names for names in types if names != {"object"}] + [{"object"}] * bool(objects)):
            return False
        return len(objects) < 2 or self._find_tag(schema) is not None

    def _optional_tags(self, schema: Schema) -> Iterator[tuple[int, str]]:
        """Yield the alternatives of `oneOf`, by id, whose tag is not required, and the tag."""
        if "oneOf" not in schema or not self._are_alone("oneOf", schema):
            return
        tag = self._find_tag(schema)
        for part in self._objects(schema):
            if tag is not None and tag not in _strings(part.get("required")):
                yield id(part), tag

    def _objects(self, schema: Schema) -> list[Schema]:
        """Return the alternatives of `oneOf`, which is the only constraint of the schema, that are objects."""
        return [part for part in map(self._follow, _alternatives(schema)) if _types(part) == {"object"}]

    def _find_tag(self, schema: Schema) -> str | None:
        """Return a property whose strings tell objects apart: one that all require, or else that all can require."""
        if id(schema) not in self._tags:
            self._tags[id(schema)] = self._search_tag(self._objects(schema))
        return self._tags[id(schema)]

    def _search_tag(self, objects: Sequence[Schema]) -> str | None:
        if len(objects) < 2 or len(set(map(id, objects))) < len(objects):
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

    def _fixed_properties(self, schema: Schema) -> dict[str, frozenset[str]]:
        """Return the properties that must be one of certain strings, with these."""
        if id(schema) not in self._properties:
            properties = schema.get("properties")
            items = properties.items() if isinstance(properties, Mapping) else ()
            found = {name: self._fixed_strings(self._follow(value)) for name, value in items}
            self._properties[id(schema)] = {name: strings for name, strings in found.items() if strings}
        return self._properties[id(schema)]

    def _fixed_strings(self, schema: Schema) -> frozenset[str]:
        """Return the strings of which a value must be one, or an empty set if it may be something else."""
        if id(schema) not in self._strings:
            values = [schema["const"]] if "const" in schema else schema.get("enum")
            is_fixed = isinstance(values, list) and all(isinstance(each, str) for each in values)
            self._strings[id(schema)] = frozenset(values or ()) if is_fixed else frozenset()
        return self._strings[id(schema)]

    def _follow(self, schema: object) -> Schema:
        """Return the schema that a schema refers to if it is a reference, which may lead to others, and else itself."""
        for _ in range(_MAX_REFERENCES):
            if not isinstance(schema, Mapping):
                return _EMPTY
            if "$ref" not in schema:
                return schema
            schema = self._resolve(schema["$ref"])
        return _EMPTY

    def _resolve(self, reference: object) -> Schema | None:
        """Return the schema that a JSON pointer refers to; None if it is none, or if the reference is not a pointer."""
        if not isinstance(reference, str):
            return None
        if reference not in self._targets:
            self._targets[reference] = _resolve(reference, self._root)
        return self._targets[reference]


def _can_close(schema: Schema) -> bool:
    """Return whether a schema can be closed, given that it alone constrains its values."""
    if "properties" not in schema or schema.keys() & (_COMBINED | _REFERENCES | _OTHERS | _FIXED):
        return False
    alternatives = _alternatives(schema)
    has_only_names = all(part.keys() & _CONSTRAINTS <= _NAMED for part in alternatives)
    used = [name for part in (schema, *alternatives) for key in _NAMED for name in _strings(part.get(key))]
    return has_only_names and _strings(schema["properties"]).issuperset(used)


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


def _alternatives(schema: Schema) -> list[Schema]:
    """Return the schemas of `anyOf` and `oneOf`. True and false stand as empty schemas."""
    lists = [value for key in _ALTERNATIVES if isinstance(value := schema.get(key), list)]
    return [part if isinstance(part, Mapping) else _EMPTY for parts in lists for part in parts]


def _parts(schema: Schema) -> Iterator[tuple[str, list[Schema]]]:
    """Yield the schemas directly within a schema, except definitions, by key. True and false are left out."""
    for key, value in schema.items():
        parts: list[Any] = []
        if key in SCHEMA_LIST_KEYS and isinstance(value, list):
            parts = value
        elif key in SCHEMA_KEYS:
            parts = [value]
        elif key in SCHEMA_MAP_KEYS and key not in _DEFINITIONS and isinstance(value, Mapping):
            parts = [*value.values()]
        if parts:
            yield key, [part for part in parts if isinstance(part, Mapping)]


def _resolve(reference: str, root: Schema) -> Schema | None:
    """Return the schema that a JSON pointer refers to; None if it is none, or if the reference is not a pointer."""
    if not re.fullmatch("#(/.{0,1000})?", reference):
        return None
    value: object = root
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and re.fullmatch("[0-9]{1,5}", name):
            value = value[int(name)] if int(name) < len(value) else None
        elif isinstance(value, Mapping):
            value = value.get(name)
        else:
            return None
    return value if isinstance(value, Mapping) else None
