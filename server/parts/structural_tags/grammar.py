"""The grammar of a structural tag, which describes an answer as a tree of parts, in llguidance's dialect of Lark.

A lexer consumes as much text as it can, so the rule for free text must contain what ends it: each part is written
together with the text after it. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import msgspec
from pydantic import ValidationError

from engine.grammar.compiler import MAX_GRAMMAR_BYTES
from server.constrained.constraints import (
    MAX_SCHEMA_DEPTH,
    Constraint,
    ConstraintBuilder,
    as_lark,
    check_schema,
    compact_schema,
    invalid,
    parse_object,
)
from server.constrained.json_schema import lark_regex
from server.http.validation import format_path, resolve_location
from server.parts.structural_tags.schemas import (
    AnyText,
    ConstString,
    Format,
    GrammarPart,
    JSONSchemaPart,
    OptionalPart,
    OrPart,
    PlusPart,
    RegexPart,
    SequencePart,
    StarPart,
    StructuralTag,
    TagPart,
    TagsWithSeparator,
    TriggeredTags,
    inner_parts,
)
from server.text.parsers.markers import ANYTHING, MarkerWriter, escape_regex

MAX_TAG_PARTS = 512  # of a structural tag; each part may repeat the grammar of the text after it


class StructuralTagError(ValueError):
    """A part that no grammar can express at its position. The message may be shown to clients."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path  # of the part in the structural tag


class Alternative(NamedTuple):
    """One form of a text: the marker it begins with, unless that is not literal text, and the rest."""

    marker: str | None
    rest: str  # a grammar expression


Alternatives = tuple[Alternative, ...]  # of the text after a part: empty at the end of the answer
UNKNOWN: Alternatives = (Alternative(None, ""),)  # text that the caller appends to the part's expression


@dataclass(slots=True)
class TagGrammar:
    """Writes the rules of a structural tag.

    Attributes:
        markers: writes texts that may contain special tokens.
        as_schema: returns a JSON schema as llguidance reads it.
        regex: returns a regular expression in Lark's notation.
        grammars: the parts that are separate grammars, by the names by which the rules refer to them.
    """

    markers: MarkerWriter
    as_schema: Callable[[Mapping[str, Any]], dict[str, Any]]
    regex: Callable[[str], str]
    grammars: dict[str, str] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)  # names of rules by their bodies
    _tags: dict[tuple[int, Alternatives], str] = field(default_factory=dict)  # `_after_begin` by its arguments
    _num_chars: int = 0  # total length of the rules

    def write(self, format: Format) -> str:
        """Return the grammar of an answer that consists of `format` alone. Raises StructuralTagError."""
        start = _either(self._alternatives(format, (), "format"), self.markers)
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules]) + "\n"

    def _add(self, rule: str) -> None:
        """Add a rule. Raises StructuralTagError if the grammar becomes larger than the engine accepts."""
        self.rules.append(rule)
        self._num_chars += len(rule)
        if self._num_chars > MAX_GRAMMAR_BYTES:
            raise StructuralTagError("format", "its grammar would be too large")

    def _rule(self, body: str) -> str:
        """Return the name of a rule with this body, which is added once however often it is used."""
        if body and body not in self._names:
            self._names[body] = f"part_{len(self.rules)}"
            self._add(f"{self._names[body]}: {body}")
        return self._names.get(body, "")

    def _alternatives(self, format: Format, following: Alternatives, path: str) -> Alternatives:
        """Return the distinct alternatives of a part, each with the text after the part."""
        return tuple(dict.fromkeys(self._list_alternatives(format, following, path)))

    def _list_alternatives(self, format: Format, following: Alternatives, path: str) -> Sequence[Alternative]:
        match format:
            case ConstString():
                rest = self._rule(_either(following, self.markers))
                return [Alternative(format.value, rest)] if format.value else following or UNKNOWN
            case SequencePart():
                alternatives = following
                for index in reversed(range(len(format.elements))):
                    alternatives = self._alternatives(format.elements[index], alternatives, f"{path}.elements[{index}]")
                return alternatives
            case OrPart():
                parts = enumerate(format.elements)
                return [
                    each for i, part in parts for each in self._alternatives(part, following, f"{path}.elements[{i}]")
                ]
            case OptionalPart():
                return [*self._alternatives(format.content, following, f"{path}.content"), *(following or UNKNOWN)]
            case TagPart():
                return [Alternative(format.begin, self._rule(self._after_begin(format, following, path)))]
            case AnyText():
                return [Alternative(None, self._free_text(format.excludes, following, path))]
            case TriggeredTags():
                return [Alternative(None, self._triggered(format, following, path))]
        rest = self._rule(_either(following, self.markers))
        return [Alternative(None, f"{self._self_delimiting(format, path)} {rest}")]

    def _self_delimiting(self, format: Format, path: str) -> str:
        """Return the expression of a part whose end does not depend on the text after it."""
        match format:
            case JSONSchemaPart():
                return self._rule(f"%json {json.dumps(self.as_schema(format.json_schema))}")
            case RegexPart():
                return self._rule(self.regex(format.pattern))
            case GrammarPart():
                name = f"grammar_{len(self.grammars)}"
                self.grammars[name] = format.grammar
                return f"@{name}"
            case PlusPart() | StarPart():
                repeated = _either(self._alternatives(format.content, UNKNOWN, f"{path}.content"), self.markers)
                return f"({repeated}){'+' if isinstance(format, PlusPart) else '*'}"
            case TagsWithSeparator():
                return self._separated(format, path)
        raise TypeError(format)

    def _after_begin(self, tag: TagPart, following: Alternatives, path: str) -> str:
        """Return the expression of a tag after its begin marker, with the text after it."""
        key = (id(tag), following)
        if key not in self._tags:
            rest = self._rule(_either(following, self.markers))
            ends = [each for end in tag.ends for each in ((Alternative(end, rest),) if end else following or UNKNOWN)]
            if not any(tag.ends) and not following:
                ends = []
            content = self._alternatives(tag.content, tuple(dict.fromkeys(ends)), f"{path}.content")
            self._tags[key] = _either(content, self.markers)
        return self._tags[key]

    def _free_text(self, excludes: Sequence[str], following: Alternatives, path: str) -> str:
        """Return the expression of any text up to the text after the part, which is included."""
        text = self._terminal(excludes)
        if not following:
            return text
        return f"({' | '.join(f'{begin} {rest}' for begin, rest in self._rules_up_to(text, following, path))})"

    def _rules_up_to(self, text: str, following: Alternatives, path: str) -> Iterator[tuple[str, str]]:
        for marker, rest in following:
            if marker is None:
                raise StructuralTagError(path, "any text must be followed by a literal text, which ends it")
            name = f"up_to_{len(self.rules)}"
            self._add(self.markers.up_to(name, text, marker))
            yield name, rest

    def _terminal(self, excludes: Sequence[str]) -> str:
        name = f"TEXT_{len(self.rules)}"
        without = f" & ~/{ANYTHING}({'|'.join(map(escape_regex, excludes))}){ANYTHING}/" if excludes else ""
        self._add(f"{name}: /{ANYTHING}/{without}")
        return name

    def _triggered(self, format: TriggeredTags, following: Alternatives, path: str) -> str:
        """Return the expression of free text with tags in it. A required tag is at the beginning."""
        text = self._terminal(format.excludes)
        by_trigger = tuple(self._by_trigger(format, path))
        tag = self._rule(" | ".join(map(" ".join, self._rules_up_to(text, by_trigger, path))))
        rest = self._rule(_either(following, self.markers))
        end = self._free_text(format.excludes, following, path)
        first = self._any_of(format.tags, path) if format.at_least_one else None
        if format.stop_after_first:
            return f"({tag} {rest} | {end})" if first is None else f"{first} {rest}"
        return f"{first or ''} {tag}* {end}"

    def _by_trigger(self, format: TriggeredTags, path: str) -> Iterator[Alternative]:
        """Yield each trigger with the expression of its tags after the trigger."""
        triggers = [_trigger_of(tag, format.triggers) for tag in format.tags]
        for index, trigger in enumerate(triggers):
            if trigger is None:
                raise StructuralTagError(
                    f"{path}.tags[{index}].begin", "expected text that begins with one of the triggers"
                )
        for number, trigger in enumerate(format.triggers):
            if trigger not in triggers:
                problem = "no tag begins with it, or all of them begin with an earlier trigger"
                raise StructuralTagError(f"{path}.triggers[{number}]", problem)
            forms = [
                f"{self.markers.write(tag.begin[len(trigger) :])} "
                + self._rule(self._after_begin(tag, UNKNOWN, f"{path}.tags[{index}]"))
                for index, tag in enumerate(format.tags)
                if triggers[index] == trigger
            ]
            yield Alternative(trigger, f"({' | '.join(forms)})")

    def _separated(self, format: TagsWithSeparator, path: str) -> str:
        tag = self._any_of(format.tags, path)
        several = tag if format.stop_after_first else f"{tag} ({self.markers.write(format.separator)} {tag})*"
        return f"({several})" if format.at_least_one else f"({several})?"

    def _any_of(self, tags: Sequence[TagPart], path: str) -> str:
        """Return the expression of any one of the tags."""
        by_tag = [self._alternatives(tag, UNKNOWN, f"{path}.tags[{index}]") for index, tag in enumerate(tags)]
        return self._rule(_either(tuple(chain.from_iterable(by_tag)), self.markers))


def _either(alternatives: Alternatives, markers: MarkerWriter) -> str:
    """Return the alternatives as one expression."""
    forms = [rest if marker is None else f"{markers.write(marker)} {rest}" for marker, rest in alternatives]
    forms = [form or '""' for form in dict.fromkeys(form.strip() for form in forms)]
    return forms[0] if len(forms) == 1 else f"({' | '.join(forms)})" if forms else ""


def _trigger_of(tag: TagPart, triggers: Sequence[str]) -> str | None:
    """Return the first trigger that a tag begins with, if any."""
    return next((trigger for trigger in triggers if tag.begin.startswith(trigger)), None)


def constraint(builder: ConstraintBuilder, tag: StructuralTag | str, param: str) -> Constraint:
    """Return the constraint of a structural tag, which may be given as text. Raises InvalidValueError."""
    tag = _parse_tag(tag, param)
    format = tag.to_format(param)
    for index, structure in enumerate(tag.structures or ()):
        check_schema(structure.schema_, f"{param}.structures[{index}].schema")
    _check_parts(format, f"{param}.format")
    as_schema = partial(compact_schema, allow_additional_properties=builder.allow_additional_properties)
    writer = TagGrammar(MarkerWriter(builder.special_ids), as_schema, lark_regex)
    try:
        grammar = writer.write(format)
    except StructuralTagError as error:
        path = error.path.removeprefix("format.").replace("tags", "structures") if tag.structures else error.path
        raise invalid(f"{param}.{path}", str(error)) from error
    if not writer.grammars:
        return Constraint(grammar, param)
    parts = [{"name": "answer", "lark_grammar": grammar}]
    parts += [{"name": name, "lark_grammar": as_lark(text, param)} for name, text in writer.grammars.items()]
    return Constraint(msgspec.json.encode({"grammars": parts}).decode(), param)


def _check_parts(format: Format, param: str) -> None:
    """Check the size and depth of a structural tag, and the schemas in it. Raises InvalidValueError."""
    num_parts, level, depth = 0, [format], 0
    while level:
        num_parts, depth = num_parts + len(level), depth + 1
        if depth > MAX_SCHEMA_DEPTH:
            raise invalid(param, f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if num_parts > MAX_TAG_PARTS:
            raise invalid(param, f"expected at most {MAX_TAG_PARTS} parts")
        for part in level:
            if isinstance(part, JSONSchemaPart):
                check_schema(part.json_schema, param)
        level = [inner for part in level for inner in inner_parts(part)]


def _parse_tag(tag: StructuralTag | str, param: str) -> StructuralTag:
    if isinstance(tag, StructuralTag):
        return tag
    value = parse_object(tag, param)
    try:
        return StructuralTag.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = format_path(resolve_location({**first, "loc": ("body", *first["loc"])}, value))
        raise invalid(f"{param}.{path}".rstrip("."), first["msg"]) from error
