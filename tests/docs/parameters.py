"""Tables of the parameters of each API, made from its request schema."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)

Schema = Mapping[str, Any]


def markdown_table(model: type[BaseModel], *, without: type[BaseModel] | None = None) -> str:
    """Return a row for each field of `model` that `without` does not have, in alphabetical order."""
    fields = model.model_json_schema(by_alias=True)["properties"]
    inherited = set() if without is None else without.model_json_schema(by_alias=True)["properties"].keys()
    lines = ["| Parameter | Type | |", "|---|---|---|"]
    for name in sorted(fields.keys() - inherited):
        description = str(fields[name].get("description", "")).replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| `{name}` | {describe(fields[name])} | {description} |")
    return "\n".join(lines) + "\n"


def describe(schema: Schema) -> str:
    """Return the type of a JSON schema in words, with its limits. Null, which always means the default, is left out."""
    *others, last = dict.fromkeys(_alternatives(schema))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(schema: Schema) -> Iterator[str]:
    for key in ("anyOf", "oneOf"):
        for option in schema.get(key, ()):
            yield from _alternatives(option)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        yield ", ".join(f"`{value}`" for value in values)
    elif "$ref" in schema:
        yield "object"
    elif schema.get("type") == "array":
        yield _array(schema) + _at_most(schema, "maxItems", "entries")
    elif schema.get("type") == "object":
        yield "object" + _at_most(schema, "maxProperties", "entries")
    elif schema.get("type") == "string":
        yield "string" + _at_most(schema, "maxLength", "characters")
    elif schema.get("type") in ("integer", "number"):
        yield f"{schema['type']}{_bounds(schema)}"
    elif schema.get("type") == "boolean":
        yield "boolean"


def _array(schema: Schema) -> str:
    """Return "array of strings", without the limits of the items."""
    items = schema["items"]
    match items.get("type"):
        case "array":
            return f"array of {_array(items).replace('array', 'arrays', 1)}"
        case str(name):
            return f"array of {name}s"
        case _:  # a reference, or several types
            kinds = (_array({"items": option}).removeprefix("array of ") for option in items.get("anyOf", ()))
            return f"array of {' or '.join(dict.fromkeys(kinds)) or 'objects'}"


def _at_most(schema: Schema, key: str, noun: str) -> str:
    return f" (at most {schema[key]:,} {noun})" if key in schema else ""


def _bounds(schema: Schema) -> str:
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in schema and schema[key] not in (INT64_MIN, INT64_MAX)
    ]
    return f" ({', '.join(bounds)})" if bounds else ""
