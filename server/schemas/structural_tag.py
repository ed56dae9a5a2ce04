"""The form of an answer as a tree of parts: vLLM's structural tags, in the form of XGrammar's.

https://xgrammar.mlc.ai/docs/structural_tag/structural_tag_api.html. Parts that name tokens, and arguments in XML, are
not supported. Beside it the older form, which is one part of this one: structures that begin with triggers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.http.errors import InvalidValueError, MissingParameterError

MAX_PARTS = 128  # of one part
MAX_MARK_CHARS = 256
MAX_TEXT_CHARS = 4096
MAX_PATTERN_CHARS = 8192
MAX_GRAMMAR_CHARS = 16_384

JSONSchema = dict[str, Any]
Mark = Annotated[str, Field(min_length=1, max_length=MAX_MARK_CHARS)]
End = Annotated[str, Field(max_length=MAX_MARK_CHARS)]
Marks = Annotated[list[Mark], Field(max_length=MAX_PARTS, fail_fast=True)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ConstString(Part):
    type: Literal["const_string"]
    value: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class JSONSchemaPart(Part):
    type: Literal["json_schema"]
    json_schema: JSONSchema
    style: Literal["json"] = "json"


class AnyText(Part):
    """Ends where what follows begins, so that has to begin with a text."""

    type: Literal["any_text"]
    excludes: Marks = Field(default=[], description="Texts that are not in it.")


class RegexPart(Part):
    type: Literal["regex"]
    pattern: Pattern


class GrammarPart(Part):
    type: Literal["grammar"]
    grammar: GrammarText


class SequencePart(Part):
    type: Literal["sequence"]
    elements: Parts


class OrPart(Part):
    type: Literal["or"]
    elements: Parts


class OptionalPart(Part):
    type: Literal["optional"]
    content: Format


class PlusPart(Part):
    type: Literal["plus"]
    content: Format


class StarPart(Part):
    type: Literal["star"]
    content: Format


class TagPart(Part):
    type: Literal["tag"] = "tag"
    begin: Mark
    content: Format
    end: End | Annotated[list[End], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]

    @property
    def ends(self) -> list[str]:
        return [self.end] if isinstance(self.end, str) else self.end


Tags = Annotated[list[TagPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Triggers = Annotated[list[Mark], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class TriggeredTags(Part):
    """Any text, but each trigger in it begins one of the tags. Where one has to be, it is the beginning."""

    type: Literal["triggered_tags"] = "triggered_tags"
    triggers: Triggers
    tags: Tags
    at_least_one: bool = False
    stop_after_first: bool = False
    excludes: Marks = Field(default=[], description="Texts that are not in the text between the tags.")


class TagsWithSeparator(Part):
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
    | SequencePart
    | OrPart
    | OptionalPart
    | PlusPart
    | StarPart
    | TagPart
    | TriggeredTags
    | TagsWithSeparator,
    Field(discriminator="type"),
]
Parts = Annotated[list[Format], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


def inner_parts(part: Format) -> list[Format]:
    """The parts that it consists of."""
    match part:
        case SequencePart() | OrPart():
            return part.elements
        case OptionalPart() | PlusPart() | StarPart() | TagPart():
            return [part.content]
        case TriggeredTags() | TagsWithSeparator():
            return list(part.tags)
    return []


class Structure(Part):
    """JSON between two marks."""

    begin: Mark
    schema_: JSONSchema = Field(alias="schema")
    end: End


Structures = Annotated[list[Structure], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class StructuralTag(Part):
    """Either a format, or structures and the triggers that they begin with."""

    type: Literal["structural_tag"]
    format: Format | None = None
    structures: Structures | None = None
    triggers: Triggers | None = None

    def parts(self, param: str) -> Format:
        """The format, also of the older form. Raises BadRequestError; `param` is what the request calls this."""
        if self.format is not None:
            if self.structures is not None or self.triggers is not None:
                message = f"Invalid '{param}.structures': not allowed with 'format'."
                raise InvalidValueError(message, param=f"{param}.structures")
            return self.format
        if self.structures is None:
            raise MissingParameterError(f"{param}.{'structures' if self.triggers is not None else 'format'}")
        if self.triggers is None:
            raise MissingParameterError(f"{param}.triggers")
        tags = [_as_tag(structure) for structure in self.structures]
        return TriggeredTags(triggers=self.triggers, tags=tags, excludes=[])


def _as_tag(structure: Structure) -> TagPart:
    content = JSONSchemaPart(type="json_schema", json_schema=structure.schema_)
    return TagPart(begin=structure.begin, content=content, end=structure.end)
