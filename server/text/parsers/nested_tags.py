"""Convert a value whose members and items are tags: `<key>value</key>` and `<item>value</item>`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from server.text.parsers.argument_values import Schema, resolve, to_json, value_types
from server.text.parsers.tool_formats import TaggedArguments

MAX_DEPTH = 64
ITEM = "item"


def nested_to_json(text: str, schema: Schema, key: str, syntax: TaggedArguments) -> str:
    """Return the value of a parameter as JSON. Text without tags, or with tags that do not match, is a plain value.

    Args:
        schema: the JSON schema of the tool's parameters.
        key: the parameter's name.
    """
    namespace = syntax.value_end.partition("</")[0]
    return _Converter(namespace, schema).convert(text, _member(schema, key, schema))


class _Converter:
    def __init__(self, namespace: str, root: Schema) -> None:
        """`namespace` is the text before each tag; `root` is the schema that `$ref` refers to."""
        self._tag = re.compile(rf"{re.escape(namespace)}<(/?)([^<>/]+)>")
        self._root = root

    def convert(self, text: str, schema: Any, depth: int = 0) -> str:
        types = value_types(schema, self._root)
        elements = self._elements(text) if depth < MAX_DEPTH else []
        if not elements:
            empty = "{}" if "object" in types else "[]"
            return empty if not text.strip() and types <= {"object", "array"} else to_json(text, types)
        is_array = "object" not in types or ("array" in types and all(name == ITEM for name, _ in elements))
        if is_array:
            items = resolve(schema, self._root).get("items", {})
            return f"[{', '.join(self.convert(value, items, depth + 1) for _, value in elements)}]"
        values = [self.convert(value, _member(schema, name, self._root), depth + 1) for name, value in elements]
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


def _member(schema: Any, name: str, root: Schema) -> Any:
    """Return the schema of a member of objects with this schema."""
    schema = resolve(schema, root)
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return schema.get("additionalProperties", {})
