"""Constraints on the format of an answer: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from server.http.errors import BadRequestError, MissingParameterError, UnsupportedParameterError, invalid
from server.http.strict_json import MAX_DEPTH, describe_size, is_deeper
from server.part_table import as_sentence, why_missing
from server.schemas.request_fields import ClosedObject, JSONSchema, OpenObject, optional
from server.schemas.tools import ToolChoice, Tools

MAX_CHOICES = 1000
MAX_CHOICE_CHARS = 4096
MAX_REGEX_CHARS = 8192
MAX_LARK_CHARS = 16_384
MAX_TAG_CHARS = 128 * 1024

TAGS = "structural_tags"  # a part
TAG_FIELDS = ("format", "structures", "triggers")  # of a tag in `response_format`
Tag: TypeAlias = dict[str, Any]  # or a part of it, which is checked when its grammar is made

# Other request fields -> the fields of `structured_outputs` that they stand for.
ALIASES = {"json_schema": "json_", "regex": "regex", "ebnf": "grammar", "grammar": "grammar"}
OUTPUT_FIELDS = frozenset({"structured_outputs", *ALIASES})  # that constrain the answer, but for `response_format`
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def check_tags(param: str) -> None:
    """Raise BadRequestError if structural tags need a part that is not installed."""
    if (missing := why_missing(TAGS)) is not None:
        raise BadRequestError(as_sentence(missing), param=param, code="part_not_installed")


class JSONSchemaFormat(ClosedObject):
    """A named JSON schema. It is always followed strictly; name and description are not shown to the model."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: JSONSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(ClosedObject):
    """OpenAI's `response_format`, with the schema of llama.cpp and the structural tags of vLLM."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JSONSchemaFormat | None = optional("Only with type json_schema.")
    schema_: JSONSchema | None = Field(
        None, alias="schema", description="llama.cpp's name of the schema, with type json_schema or json_object."
    )
    format: Tag | None = optional("Only with type structural_tag.")
    structures: list[Any] | None = optional("Only with type structural_tag, instead of a format.")
    triggers: list[Any] | None = optional("Only with structures: texts with which these begin.")

    @property
    def structural_tag(self) -> Tag | None:
        fields = {name: getattr(self, name) for name in ("type", *TAG_FIELDS)}
        tag = {name: value for name, value in fields.items() if value is not None}
        return tag if self.type == "structural_tag" else None

    def check(self) -> None:
        if self.type == "structural_tag":
            check_tags("response_format")
        for name in TAG_FIELDS:
            if self.type != "structural_tag" and getattr(self, name) is not None:
                raise invalid(f"response_format.{name}", "only allowed with 'type': 'structural_tag'")
        if self.schema_ is not None and (self.json_schema is not None or not self.type.startswith("json")):
            raise invalid("response_format.schema", "only allowed instead of 'json_schema'")
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise MissingParameterError("response_format.json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise invalid("response_format.json_schema", "only allowed with 'type': 'json_schema'")


Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)]
Lark = Annotated[str, Field(min_length=1, max_length=MAX_LARK_CHARS)]


class StructuredOutputs(OpenObject):
    """vLLM's `structured_outputs`: exactly one of KINDS, and options that must match what this server does anyway."""

    json_: JSONSchema | str | None = Field(None, alias="json", description="A JSON schema, or the text of one.")
    json_object: bool | None = optional("Any JSON object.")
    regex: Regex | None = optional("A regular expression that the whole answer must match.")
    choice: Choices | None = optional("Texts of which the answer must be one.")
    grammar: Lark | None = optional(
        "A grammar in Lark's notation, with the start rule `start`, or in GBNF, with `root`."
    )
    structural_tag: Tag | Annotated[str, Field(max_length=MAX_TAG_CHARS)] | None = optional(
        "A structural tag, as an object or as its JSON text."
    )
    disable_any_whitespace: bool | None = optional("Null or true: JSON is always generated without white space.")
    disable_fallback: bool | None = optional("Accepted; there is no fallback.")
    disable_additional_properties: bool | None = optional(
        "Close objects for which the schema has properties, but no additionalProperties. Default true, or "
        "false with --allow-additional-properties."
    )
    whitespace_pattern: str | None = optional("Not supported yet: null.")

    def check(self) -> None:
        if self.structural_tag is not None:
            check_tags("structured_outputs.structural_tag")
        if self.whitespace_pattern is not None:
            raise UnsupportedParameterError("structured_outputs.whitespace_pattern")
        if self.disable_any_whitespace is False:
            problem = "expected true, because JSON is always generated without white space"
            raise invalid("structured_outputs.disable_any_whitespace", problem)
        if len(self.constraints) != 1:
            got = " and ".join(self.constraints) or "none"
            raise invalid("structured_outputs", f"expected exactly one of {', '.join(KINDS)}, but got {got}")

    @property
    def constraints(self) -> dict[str, Any]:
        """The values of the fields in KINDS that are set, by name: one, in a valid request."""
        fields = [(field.alias or name, getattr(self, name)) for name, field in type(self).model_fields.items()]
        return {name: value for name, value in fields if name in KINDS and value not in (None, False)}


class StructuredOutputsFields(BaseModel):
    """`structured_outputs`, and other fields that stand for its fields."""

    structured_outputs: StructuredOutputs | None = optional("Constraints on the answer.")
    json_schema: JSONSchema | str | None = optional("SGLang's name of structured_outputs.json.")
    regex: Regex | None = optional("SGLang's name of structured_outputs.regex.")
    ebnf: Lark | None = optional("SGLang's name of structured_outputs.grammar.")
    grammar: Annotated[str, Field(max_length=MAX_LARK_CHARS)] | None = optional(
        "llama.cpp's name of structured_outputs.grammar. Empty: none."
    )

    @property
    def requested_outputs(self) -> dict[str, StructuredOutputs]:
        """The constraints by the names of the fields that set them. In a valid request, all are the same."""
        values = [(name, field, getattr(self, name)) for name, field in ALIASES.items()]
        requested = {
            name: StructuredOutputs.model_construct(**{field: value})
            for name, field, value in values
            if value not in (None, "")
        }
        own = self.structured_outputs
        if own is not None and (own.model_fields_set or not requested):
            requested["structured_outputs"] = own
        return requested

    @property
    def output_param(self) -> str | None:
        """The field that sets the constraint, for error messages."""
        name, outputs = next(reversed(self.requested_outputs.items()), (None, None))  # all are the same
        if outputs is None or outputs is not self.structured_outputs:
            return name
        return f"structured_outputs.{next(iter(outputs.constraints))}"

    def check_structured_outputs(self) -> None:
        requested = self.requested_outputs
        if own := requested.get("structured_outputs"):
            own.check()
        for name, outputs in requested.items():
            first = next(iter(requested))
            if _canonical(outputs.constraints) != _canonical(requested[first].constraints):
                raise invalid(first, f"not allowed with '{name}', which sets another constraint")


def _canonical(constraints: Mapping[str, Any]) -> bytes:
    """Return constraints in a form in which they can be compared: schemas may be given as text, too."""
    values = dict(constraints)
    if isinstance(text := values.get("json"), str) and describe_size([text.encode()]) is None:
        with suppress(msgspec.DecodeError, RecursionError):
            schema = msgspec.json.decode(text)
            values["json"] = text if is_deeper(schema, MAX_DEPTH) else schema
    return msgspec.json.encode(values, enc_hook=repr)


class ConstrainedFields(StructuredOutputsFields):
    """The fields of a request that constrain its answer."""

    model_config = ConfigDict(strict=True)

    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None


# Fields of a request whose answer may have a grammar.
CONSTRAINED_FIELDS = OUTPUT_FIELDS | {"response_format", "tools"}
