"""Converts response formats, structured outputs and schemas of a request to one grammar for the engine.

JSON is generated in compact form: with optional white space, a model could fill the whole answer with it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from server.constrained.json_schema import normalize_schema, regex_grammar
from server.http.errors import invalid
from server.http.strict_json import is_deeper
from server.part_table import load_module
from server.schemas.structured_outputs import ConstrainedFields, ResponseFormat, StructuredOutputs
from server.text.parsers.markers import escape_regex

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64  # nested arrays and objects
NUMBER_KEYS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OPTIONS = "x-guidance"  # llguidance's own key for options in a schema
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that an answer must match."""

    grammar: str  # in the format of engine.grammar
    param: str  # the request field it comes from, for error messages
    # Schemas of tools, checked first so that an error names the tool's field.
    checked_first: Sequence["Constraint"] = ()


@dataclass(frozen=True, slots=True)
class ConstraintBuilder:
    """Makes the constraints on content.

    Attributes:
        special_ids: token ids of the special tokens.
        allow_additional_properties: see `normalize_schema`.
    """

    special_ids: Mapping[str, int]
    allow_additional_properties: bool = False

    def content(self, body: ConstrainedFields) -> Constraint | None:
        """Return the constraint on an answer's content, or None if it is free text. Raises InvalidValueError."""
        of_format = self._response_format(body.response_format)
        other = self._structured_outputs(body)
        if of_format is not None and other is not None and of_format.grammar != other.grammar:
            if of_format.grammar == self.json_schema({"type": "object"}, "").grammar and _is_object(other.grammar):
                return other
            raise invalid(other.param, f"not allowed with '{of_format.param.partition('.')[0]}'")
        return of_format or other

    def json_schema(self, schema: Mapping[str, Any], param: str) -> Constraint:
        """Return the constraint to compact JSON that is valid under a schema. Raises InvalidValueError."""
        check_schema(schema, param)
        compact = compact_schema(schema, allow_additional_properties=self.allow_additional_properties)
        return Constraint(msgspec.json.encode({"grammars": [{"json_schema": compact}]}).decode(), param)

    def _response_format(self, format: ResponseFormat | None) -> Constraint | None:
        if format is None or format.type == "text":
            return None
        if format.structural_tag is not None:
            return _tag_constraint(self, format.structural_tag, "response_format")
        if format.schema_ is not None:
            return self.json_schema(format.schema_, "response_format.schema")
        if format.json_schema is None:
            return self.json_schema({"type": "object"}, "response_format")
        return self.json_schema(format.json_schema.schema_, "response_format.json_schema.schema")

    def _structured_outputs(self, body: ConstrainedFields) -> Constraint | None:
        """Return the constraint of `structured_outputs`, or of other fields that stand for its fields."""
        if (param := body.output_param) is None:
            return None
        outputs = next(reversed(body.requested_outputs.values()))  # all are the same
        if outputs.disable_additional_properties is None:
            return self._outputs(outputs, param)
        allow = not outputs.disable_additional_properties
        return replace(self, allow_additional_properties=allow)._outputs(outputs, param)

    def _outputs(self, outputs: StructuredOutputs, param: str) -> Constraint:
        """Return the constraint of structured outputs; `param` is the field that has it."""
        if outputs.structural_tag is not None:
            return _tag_constraint(self, outputs.structural_tag, param)
        if outputs.regex is not None:
            return Constraint(regex_grammar(outputs.regex), param)
        if outputs.choice is not None:
            return Constraint(regex_grammar("|".join(map(escape_regex, outputs.choice))), param)
        if outputs.grammar is not None:
            if outputs.grammar.lstrip().startswith("{"):
                raise invalid(param, "expected a grammar in Lark's notation, but got JSON")
            return Constraint(as_lark(outputs.grammar, param), param)
        if outputs.json_ is None:
            return self.json_schema({"type": "object"}, param)
        return self.json_schema(
            parse_object(outputs.json_, param) if isinstance(outputs.json_, str) else outputs.json_, param
        )


def _tag_constraint(builder: ConstraintBuilder, tag: Any, param: str) -> Constraint:
    constraint: Constraint = load_module("structural_tags", "grammar").constraint(builder, tag, param)
    return constraint


def has_unique_items(value: object) -> bool:
    """Return whether schemas within a value, which may be given as text, ask for arrays without duplicates."""
    return re.search(rb'\\?"uniqueItems\\?"\s*:\s*true', msgspec.json.encode(value)) is not None


def named_grammar(name: str, grammar: str) -> dict[str, Any]:
    """Return a grammar as an entry of llguidance's list of grammars, where other grammars call it `@name`."""
    is_json = grammar.startswith("{")
    entry: dict[str, Any] = msgspec.json.decode(grammar)["grammars"][0] if is_json else {"lark_grammar": grammar}
    return {**entry, "name": name}


def _is_object(grammar: str) -> bool:
    """Return whether a grammar is that of a schema of objects."""
    grammars = msgspec.json.decode(grammar)["grammars"] if grammar.startswith("{") else [{}]
    return bool((grammars[0].get("json_schema") or {}).get("type") == "object")


def as_lark(grammar: str, param: str) -> str:
    """Return a grammar in Lark's notation; rules of the form `name ::= ...` are llama.cpp's GBNF."""
    if not re.search(r"^[ \t]*[\w-]+[ \t]*::=", grammar, re.MULTILINE):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except GbnfToLarkError as error:
        raise invalid(param, one_line(error)) from error
    except Exception as error:  # gbnf_to_lark raises bare Exceptions for missing rules, others for truncated text
        problem = one_line(error) if type(error) is Exception else "it ends too early, or is nested too deep"
        raise invalid(param, problem) from error


def one_line(error: Exception) -> str:
    """Return the message of another library as the end of a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def parse_object(text: str, param: str) -> dict[str, Any]:
    """Decode the text of a JSON object. Raises InvalidValueError."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(param, "the text is not valid JSON") from error
    if not isinstance(value, dict):
        raise invalid(param, "the text must hold a JSON object")
    return value


def compact_schema(schema: Mapping[str, Any], *, allow_additional_properties: bool) -> dict[str, Any]:
    return {**normalize_schema(schema, allow_additional_properties=allow_additional_properties), OPTIONS: COMPACT}


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raise InvalidValueError for a schema that is too large, or that llguidance accepts but does not follow."""
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise invalid(param, f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    num_bytes = len(msgspec.json.encode(schema))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise invalid(param, f"expected a schema of at most {MAX_SCHEMA_BYTES} bytes, but got {num_bytes}")
    values = list(_values(schema))
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values):
        raise invalid(param, "integers beyond 64 bits are not supported")
    for number in _values([value.get(key) for value in values if isinstance(value, dict) for key in NUMBER_KEYS]):
        if isinstance(number, int) and not _is_exact(number):
            raise invalid(param, f"the integer {number} is not supported: it cannot be represented exactly")
    if any(isinstance(value, dict) and _counts_optional_names(value) for value in values):
        raise invalid(param, "'minProperties' is not supported above the number of required properties")
    if OPTIONS in schema:
        raise invalid(param, f"the key '{OPTIONS}' is not supported")


def _is_exact(value: int) -> bool:
    """Return whether llguidance, which stores numbers as 64-bit floats, keeps an integer exactly.

    At -2^63 it would recurse until its stack is full.
    """
    return value == 2**63 - 1 or (value > -(2**63) and int(float(value)) == value)


def _counts_optional_names(schema: Mapping[str, Any]) -> bool:
    """Return whether `minProperties` requires optional properties.

    An answer could then count a property twice by repeating its name, which no grammar can prevent.
    """
    minimum, required = schema.get("minProperties"), schema.get("required")
    return isinstance(minimum, int) and minimum > (len(required) if isinstance(required, list) else 0)


def _values(value: object) -> Iterator[object]:
    """Yield a JSON value and all values in it."""
    pending = [value]
    while pending:
        yield (value := pending.pop())
        pending += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
