"""Rewrites JSON schemas and patterns in the forms that llguidance follows: patterns are those of Rust's crate regex.

Objects are closed. JSON Schema allows further properties in every object whose schema has no `additionalProperties`,
but schemas that are made from classes rarely mean this, and models make use of it. So a schema with `properties` gets
no others, unless a schema anywhere in the whole one is combined with others: then it might become unsatisfiable, or an
answer valid that is not so under the original schema.

In `oneOf`, a narrower alternative can make an answer valid that matched two of them. So a property, the tag, must tell
its objects apart by the strings that it may have. It becomes required: it is optional in schemas made from classes that
have a default for it, such as pydantic's.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from llguidance import LLMatcher

from server.text.parsers.markers import escape_regex

# Keys whose value is a schema, a list of schemas, or an object of schemas by name.
SCHEMA_KEYS = frozenset(
    ("items", "additionalProperties", "additionalItems", "propertyNames", "not", "if", "then", "else", "contains")
)
SCHEMA_LIST_KEYS = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
SCHEMA_MAP_KEYS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

ANNOTATIONS = ("title", "description")
ANY_NAME: tuple[Any, ...] = (True, {}, {"type": "string"})  # values of propertyNames that allow all names

# A schema that has one of these, or one of `_VALUES` beside another key of `_VALUES` or `_PARTS`, is combined.
_COMBINING = frozenset(
    (
        *("not", "if", "contains", "dependencies", "dependentSchemas", "dependentRequired", "maxProperties"),
        *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
    )
)
_VALUES = frozenset(("$ref", "anyOf", "oneOf", "allOf", "enum", "const"))
_PARTS = frozenset(("properties", "patternProperties", "additionalProperties", "required", "items", "prefixItems"))
_OPEN = frozenset(("additionalProperties", "propertyNames"))
_TAG = frozenset(("type", "const", "enum", "default", "examples", *ANNOTATIONS))  # keys of a tag's schema
_SCALARS = ("string", "number", "integer", "boolean", "null")

# Rust's classes cover all of Unicode. Those of JSON Schema's dialect, ECMAScript's, are ASCII. A class in brackets may
# stand within brackets too, so that these need not be told apart.
_ASCII_CLASSES = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[\x09-\x0D\x20]"}
_NEGATED = {name.upper(): f"[^{text[1:]}" for name, text in _ASCII_CLASSES.items()}
_CLASSES = {"": r"\-", **_ASCII_CLASSES, **_NEGATED}  # "": a hyphen before a class

Schema: TypeAlias = Mapping[str, Any]
Tags: TypeAlias = Mapping[int, set[str]]  # properties that become required, by the ids (Python's) of schemas


def normalize_schema(schema: Schema, *, allow_additional_properties: bool = False) -> dict[str, Any]:
    """Return the schema for llguidance. Recurses, so the caller bounds the depth of `schema`.

    Args:
        allow_additional_properties: whether objects whose schema names properties and has no `additionalProperties`
            may have others.
    """
    tags = find_tags(schema)
    return _normalize(schema, tags or {}, closes=tags is not None and not allow_additional_properties)


def find_tags(root: Schema) -> Tags | None:
    """Return the tags of alternatives that become required; None if no object can be closed."""
    tags: defaultdict[int, set[str]] = defaultdict(set)
    for schema in _schemas(root):
        if _is_combined(schema):
            return None
        if "oneOf" in schema:
            objects = _objects(schema["oneOf"], root)
            tag = _find_tag(objects) if objects[1:] else ""
            if tag is None:
                return None
            for each in objects if tag else ():
                tags[id(each)].add(tag)
    return tags


def _schemas(root: Schema) -> Iterator[Schema]:
    """Yield a schema and all schemas in it. True and false are left out."""
    pending: list[Any] = [root]
    while pending:
        if not isinstance(schema := pending.pop(), Mapping):
            continue
        yield schema
        for key, value in schema.items():
            if key in SCHEMA_KEYS:
                pending.append(value)
            if key in SCHEMA_LIST_KEYS and isinstance(value, list):
                pending += value
            if key in SCHEMA_MAP_KEYS and isinstance(value, Mapping):
                pending += value.values()


def _is_combined(schema: Schema) -> bool:
    """Return whether a schema says more about a value, or a part of it, than one of its keys does."""
    used = schema.keys() & (_VALUES | _PARTS)
    several = len(used) > 1 and bool(used & _VALUES)
    overlap = {"properties", "patternProperties"} <= used or len(schema.get("allOf") or ".") > 1
    return several or overlap or not _COMBINING.isdisjoint(schema)


def _objects(alternatives: Any, root: Schema) -> list[Schema]:
    """Return the alternatives that are no scalars, with definitions in place of references to them."""
    found = [_follow(_mapping(part), root) for part in alternatives] if isinstance(alternatives, list) else []
    return [schema for schema in found if schema.get("type") not in _SCALARS]


def _follow(schema: Schema, root: Schema) -> Schema:
    match str(schema.get("$ref")).split("/"):
        case ["#", ("$defs" | "definitions") as key, name]:
            return _mapping(_mapping(root.get(key)).get(name))
    return schema


def _find_tag(objects: list[Schema]) -> str | None:
    """Return a property whose strings tell objects apart."""
    for name in _mapping(objects[0].get("properties")):
        values = [_texts(each, name) for each in objects]
        if all(values) and len(set[str]().union(*values)) == sum(map(len, values)):
            return name
    return None


def _texts(schema: Schema, name: str) -> set[str]:
    """Return the strings of which a property of an object must be one, if it is there; none if it may be others."""
    value = _mapping(_mapping(schema.get("properties")).get(name))
    values = [value["const"]] if "const" in value else value.get("enum")
    is_tag = value.keys() <= _TAG and value.get("type", "string") == "string" and not {"const", "enum"} <= value.keys()
    is_object = schema.get("type") == "object" and isinstance(schema.get("required", []), list)
    has_texts = isinstance(values, list) and all(isinstance(each, str) for each in values)
    return set(values) if is_tag and is_object and has_texts and values else set()


def _mapping(value: object) -> Schema:
    return value if isinstance(value, Mapping) else {}


def _normalize(schema: Schema, tags: Tags, *, closes: bool) -> dict[str, Any]:
    result = {key: _normalize_value(key, value, tags, closes=closes) for key, value in schema.items()}
    if closes and "properties" in schema and _OPEN.isdisjoint(schema) and _names_all(schema):
        result["additionalProperties"] = False
    if required := tags.get(id(schema)):
        result["required"] = list(dict.fromkeys((*result.get("required", ()), *sorted(required))))
    if isinstance(pattern := result.get("pattern"), str):
        result["pattern"] = ascii_classes(pattern)
    if isinstance(result.get("uniqueItems"), bool):  # not enforced: see `unenforced_keywords`
        del result["uniqueItems"]
    names = result.pop("propertyNames", None)
    if names is not None and names not in ANY_NAME:
        result |= _replace_property_names(names, result)
    return result


def _names_all(schema: Schema) -> bool:
    """Return whether the properties that an object must have are among those that its schema names."""
    required = schema.get("required", [])
    properties = _mapping(schema["properties"])
    return isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required)


def _normalize_value(key: str, value: Any, tags: Tags, *, closes: bool) -> Any:
    def normalize(item: Any) -> Any:
        return _normalize(item, tags, closes=closes) if isinstance(item, Mapping) else item

    if key in SCHEMA_KEYS and isinstance(value, Mapping):
        return normalize(value)
    if key in SCHEMA_LIST_KEYS and isinstance(value, list):
        return list(map(normalize, value))
    if key in SCHEMA_MAP_KEYS and isinstance(value, Mapping):
        result = {name: normalize(item) for name, item in value.items()}
        return _with_ascii_names(result) if key == "patternProperties" else result
    return value


def _with_ascii_names(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of `patternProperties` with patterns for llguidance, which refuses two that are the same."""
    result: dict[str, Any] = {}
    for pattern, schema in schemas.items():
        name = ascii_classes(pattern)
        while name in result:
            name = f"(?:{name})"
        result[name] = schema
    return result


def _replace_property_names(names: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys that restrict property names as `propertyNames` does, or that key itself if none can."""
    if {"properties", "patternProperties"} & schema.keys() or not isinstance(names, Mapping):
        return {"propertyNames": names}
    value = schema.get("additionalProperties", True)
    match {key: value for key, value in names.items() if (key, value) != ("type", "string") and key not in ANNOTATIONS}:
        case {"enum": [*allowed], **others} if not others and all(isinstance(name, str) for name in allowed):
            pattern = "|".join(map(escape_regex, allowed))  # one pattern, so that the value's schema is compiled once
            return {"patternProperties": {f"^({pattern})$": value}, "additionalProperties": False}
        case {"pattern": str(pattern), **others} if not others:
            return {"patternProperties": {pattern: value}, "additionalProperties": False}
    return {"propertyNames": names}


def ascii_classes(pattern: str) -> str:
    r"""Return the pattern with `\d`, `\w`, `\s` and their complements in ASCII, as in Python with `re.ASCII`."""
    # A hyphen before a class within brackets is a literal, not a range that ends with a bracket.
    return re.sub(r"\\(.)|-(?=\\[dwsDWS])", lambda found: _CLASSES.get(found[1] or "", found[0]), pattern, flags=re.S)


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that match a pattern as a whole."""
    return LLMatcher.grammar_from_regex(ascii_classes(pattern))


def lark_regex(pattern: str) -> str:
    """Return a regular expression in Lark's notation."""
    grammar = msgspec.json.decode(regex_grammar(pattern))
    lark: str = grammar["grammars"][0]["lark_grammar"]
    return lark.removeprefix("start: ")
