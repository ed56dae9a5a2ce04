"""Convert a value whose members and items are tags: `<key>value</key>` and `<item>value</item>`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from server.text.parsers.argument_values import ArgumentSchema, to_json
from server.text.parsers.tool_formats import TaggedArguments

MAX_DEPTH = 64
ITEM = "item"


def nested_to_json(text: str, schema: ArgumentSchema, key: str, syntax: TaggedArguments) -> str:
    """Return the value of a parameter as JSON. Text without tags, or with tags that do not match, is a plain value.

    Args:
        schema: the schema of the tool's parameters.
        key: the parameter's name.
    """
    converter = _Converter(namespace_of(syntax), schema)
    return converter.convert(text, converter.member(schema.root, key))


def namespace_of(syntax: TaggedArguments) -> str:
    """Return the text before each tag."""
    return syntax.value_end.partition("</")[0]


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
