"""Structural tags, which describe the format of an answer as a tree of parts, as in vLLM and XGrammar.

https://xgrammar.mlc.ai/docs/structural_tag/structural_tag_api.html. Parts that refer to tokens, and XML arguments, are
not supported. The older form, structures that begin with triggers, is converted to this one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.http.errors import MissingParameterError, invalid
from server.schemas.request_fields import ClosedObject, JSONSchema

MAX_PARTS = 128  # inner parts of one part
MAX_MARKER_CHARS = 256
MAX_TEXT_CHARS = 4096
MAX_PATTERN_CHARS = 8192
MAX_GRAMMAR_CHARS = 16_384

Marker = Annotated[str, Field(min_length=1, max_length=MAX_MARKER_CHARS)]
End = Annotated[str, Field(max_length=MAX_MARKER_CHARS)]
Markers = Annotated[list[Marker], Field(max_length=MAX_PARTS, fail_fast=True)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class StructuralPart(ClosedObject):
    """Base class of the parts."""


class ConstString(StructuralPart):
    type: Literal["const_string"]
    value: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class JSONSchemaPart(StructuralPart):
    type: Literal["json_schema"]
    json_schema: JSONSchema
    style: Literal["json"] = "json"


class AnyText(StructuralPart):
    """Free text. It ends where the next part begins, which must begin with a literal text."""

    type: Literal["any_text"]
    excludes: Markers = Field(default=[], description="Texts that must not occur in it.")


class RegexPart(StructuralPart):
    type: Literal["regex"]
    pattern: Pattern


class GrammarPart(StructuralPart):
    type: Literal["grammar"]
    grammar: GrammarText


class SeveralParts(StructuralPart):
    type: Literal["sequence", "or"]
    elements: Parts


class RepeatedPart(StructuralPart):
    type: Literal["optional", "plus", "star"]
    content: Format


class TagPart(StructuralPart):
    type: Literal["tag"] = "tag"
    begin: Marker
    content: Format
    end: End | Annotated[list[End], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]

    @property
    def ends(self) -> list[str]:
        return [self.end] if isinstance(self.end, str) else self.end


Tags = Annotated[list[TagPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Triggers = Annotated[list[Marker], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class TriggeredTags(StructuralPart):
    """Free text in which each trigger begins one of the tags. With at_least_one, the text begins with a tag."""

    type: Literal["triggered_tags"] = "triggered_tags"
    triggers: Triggers
    tags: Tags
    at_least_one: bool = False
    stop_after_first: bool = False
    excludes: Markers = Field(default=[], description="Texts that must not occur between the tags.")


class TagsWithSeparator(StructuralPart):
    type: Literal["tags_with_separator"]
    tags: Tags
    separator: End
    at_least_one: bool = False
    stop_after_first: bool = False


Format = Annotated[
    ConstString
    | JSONSchemaPart
    | AnyText
    | RegexPart
    | GrammarPart
    | SeveralParts
    | RepeatedPart
    | TagPart
    | TriggeredTags
    | TagsWithSeparator,
    Field(discriminator="type"),
]
Parts = Annotated[list[Format], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


def inner_parts(part: Format) -> list[Format]:
    """Return the parts that a part directly contains."""
    match part:
        case SeveralParts():
            return part.elements
        case RepeatedPart() | TagPart():
            return [part.content]
        case TriggeredTags() | TagsWithSeparator():
            return list(part.tags)
    return []


class Structure(StructuralPart):
    """JSON between two markers."""

    begin: Marker
    schema_: JSONSchema = Field(alias="schema")
    end: End


Structures = Annotated[list[Structure], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class StructuralTag(StructuralPart):
    """A structural tag: either a format, or structures with the triggers that they begin with."""

    type: Literal["structural_tag"]
    format: Format | None = None
    structures: Structures | None = None
    triggers: Triggers | None = None

    def to_format(self, param: str) -> Format:
        """Return the format, converted from the older form if necessary.

        Raises BadRequestError, in which the tag is called `param`.
        """
        if self.format is not None:
            if self.structures is not None or self.triggers is not None:
                raise invalid(f"{param}.structures", "not allowed with 'format'")
            return self.format
        if self.structures is None:
            raise MissingParameterError(f"{param}.{'structures' if self.triggers is not None else 'format'}")
        if self.triggers is None:
            raise MissingParameterError(f"{param}.triggers")
        contents = [JSONSchemaPart(type="json_schema", json_schema=each.schema_) for each in self.structures]
        tags = [
            TagPart(begin=each.begin, content=content, end=each.end)
            for each, content in zip(self.structures, contents, strict=True)
        ]
        return TriggeredTags(triggers=self.triggers, tags=tags)
