"""The grammar of a structural tag, which describes an answer as a tree of parts, in llguidance's dialect of Lark.

A lexer consumes as much text as it can, so the rule for free text must contain what ends it: each part is written
together with the text after it. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
    parse_object,
)
from server.constrained.json_schema import lark_regex
from server.http.errors import invalid
from server.http.validation import from_validation_error
from server.parts.structural_tags import schemas
from server.parts.structural_tags.schemas import Format
from server.text.parsers.markers import ANYTHING, MarkerWriter, escape_regex

MAX_TAG_PARTS = 512  # of a structural tag; each part may repeat the grammar of the text after it


class Alternative(NamedTuple):
    """One form of a text: the marker it begins with, unless that is not literal text, and the rest."""

    marker: str | None
    rest: str  # a grammar expression


Alternatives = tuple[Alternative, ...]  # of the text after a part: empty at the end of the answer
UNKNOWN: Alternatives = (Alternative(None, ""),)  # text that the caller appends to the part's expression


@dataclass(slots=True)
class TagGrammar:
    """Writes the rules of a structural tag. Raises InvalidValueError for what no grammar can express at its position.

    Paths are those of parts in the request.

    Attributes:
        grammars: the parts that are separate grammars, by the names by which the rules refer to them.
    """

    builder: ConstraintBuilder
    tags_name: str = "tags"
    grammars: dict[str, str] = field(default_factory=dict)
    _rules: list[str] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)  # names of rules by their bodies
    _num_chars: int = 0  # total length of the rules

    @property
    def markers(self) -> MarkerWriter:
        return MarkerWriter(self.builder.special_ids)

    def write(self, format: Format, path: str) -> str:
        """Return the grammar of an answer that consists of `format` alone."""
        start = self._either(self._alternatives(format, (), path))
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"

    def _add(self, rule: str) -> None:
        """Add a rule, unless the grammar becomes larger than the engine accepts."""
        self._rules.append(rule)
        self._num_chars += len(rule)
        if self._num_chars > MAX_GRAMMAR_BYTES:
            raise invalid("structural_tag", "its grammar would be too large")

    def _rule(self, body: str) -> str:
        """Return the name of a rule with this body, which is added once however often it is used."""
        if body and body not in self._names:
            self._names[body] = f"part_{len(self._rules)}"
            self._add(f"{self._names[body]}: {body}")
        return self._names.get(body, "")

    def _alternatives(self, format: Format, following: Alternatives, path: str) -> Alternatives:
        """Return the distinct alternatives of a part, each with the text after the part."""
        return tuple(dict.fromkeys(self._list_alternatives(format, following, path)))

    def _list_alternatives(self, format: Format, following: Alternatives, path: str) -> Sequence[Alternative]:
        match format:
            case schemas.ConstString():
                rest = self._rule(self._either(following))
                return [Alternative(format.value, rest)] if format.value else following or UNKNOWN
            case schemas.SeveralParts(type="or"):
                return self._of_all(format.elements, following, f"{path}.elements")
            case schemas.SeveralParts():
                for index in reversed(range(len(format.elements))):
                    following = self._alternatives(format.elements[index], following, f"{path}.elements[{index}]")
                return following
            case schemas.RepeatedPart(type="optional"):
                return [*self._alternatives(format.content, following, f"{path}.content"), *(following or UNKNOWN)]
            case schemas.TagPart():
                return [Alternative(format.begin, self._rule(self._after_begin(format, following, path)))]
            case schemas.AnyText():
                return [Alternative(None, self._free_text(format.excludes, following, path))]
            case schemas.TriggeredTags():
                return [Alternative(None, self._triggered(format, following, path))]
        return [Alternative(None, f"{self._self_delimiting(format, path)} {self._rule(self._either(following))}")]

    def _self_delimiting(self, format: Format, path: str) -> str:
        """Return the expression of a part whose end does not depend on the text after it."""
        match format:
            case schemas.JSONSchemaPart():
                allow = self.builder.allow_additional_properties
                schema = compact_schema(format.json_schema, allow_additional_properties=allow)
                return self._rule(f"%json {json.dumps(schema)}")
            case schemas.RegexPart():
                return self._rule(lark_regex(format.pattern))
            case schemas.GrammarPart():
                name = f"grammar_{len(self.grammars)}"
                self.grammars[name] = format.grammar
                return f"@{name}"
            case schemas.RepeatedPart():
                repeated = self._either(self._alternatives(format.content, UNKNOWN, f"{path}.content"))
                return f"({repeated}){'+' if format.type == 'plus' else '*'}"
            case schemas.TagsWithSeparator():
                tag = self._any_of(format.tags, path)
                more = "" if format.stop_after_first else f" ({self.markers.write(format.separator)} {tag})*"
                return f"({tag}{more}){'' if format.at_least_one else '?'}"
        raise TypeError(format)

    def _of_all(self, parts: Sequence[Format], following: Alternatives, path: str) -> Sequence[Alternative]:
        found = [self._alternatives(part, following, f"{path}[{index}]") for index, part in enumerate(parts)]
        return [each for alternatives in found for each in alternatives]

    def _any_of(self, tags: Sequence[schemas.TagPart], path: str) -> str:
        """Return the expression of any one of the tags."""
        return self._rule(self._either(self._of_all(tags, UNKNOWN, f"{path}.{self.tags_name}")))

    def _after_begin(self, tag: schemas.TagPart, following: Alternatives, path: str) -> str:
        """Return the expression of a tag after its begin marker, with the text after it."""
        rest = self._rule(self._either(following))
        ends = [each for end in tag.ends for each in ((Alternative(end, rest),) if end else following or UNKNOWN)]
        if not any(tag.ends) and not following:
            ends = []
        return self._either(self._alternatives(tag.content, tuple(dict.fromkeys(ends)), f"{path}.content"))

    def _free_text(self, excludes: Sequence[str], following: Alternatives, path: str) -> str:
        """Return the expression of any text up to the text after the part, which is included."""
        text = self._terminal(excludes)
        return f"({' | '.join(self._up_to(text, following, path))})" if following else text

    def _up_to(self, text: str, following: Alternatives, path: str) -> Iterator[str]:
        for marker, rest in following:
            if marker is None:
                raise invalid(path, "any text must be followed by a literal text, which ends it")
            name = f"up_to_{len(self._rules)}"
            self._add(self.markers.up_to(name, text, marker))
            yield f"{name} {rest}"

    def _terminal(self, excludes: Sequence[str]) -> str:
        name = f"TEXT_{len(self._rules)}"
        without = f" & ~/{ANYTHING}({'|'.join(map(escape_regex, excludes))}){ANYTHING}/" if excludes else ""
        self._add(f"{name}: /{ANYTHING}/{without}")
        return name

    def _triggered(self, format: schemas.TriggeredTags, following: Alternatives, path: str) -> str:
        """Return the expression of free text with tags in it. A required tag is at the beginning."""
        text = self._terminal(format.excludes)
        tag = self._rule(" | ".join(self._up_to(text, tuple(self._by_trigger(format, path)), path)))
        rest = self._rule(self._either(following))
        end = self._free_text(format.excludes, following, path)
        first = self._any_of(format.tags, path) if format.at_least_one else None
        if format.stop_after_first:
            return f"({tag} {rest} | {end})" if first is None else f"{first} {rest}"
        return f"{first or ''} {tag}* {end}"

    def _by_trigger(self, format: schemas.TriggeredTags, path: str) -> Iterator[Alternative]:
        """Yield each trigger with the expression of its tags after the trigger."""
        forms: dict[str, list[str]] = {trigger: [] for trigger in format.triggers}
        for index, tag in enumerate(format.tags):
            tag_path = f"{path}.{self.tags_name}[{index}]"
            trigger = next((each for each in format.triggers if tag.begin.startswith(each)), None)
            if trigger is None:
                raise invalid(f"{tag_path}.begin", "expected text that begins with one of the triggers")
            rest = self._rule(self._after_begin(tag, UNKNOWN, tag_path))
            forms[trigger].append(f"{self.markers.write(tag.begin[len(trigger) :])} {rest}")
        for number, trigger in enumerate(format.triggers):
            if not forms[trigger]:
                problem = "no tag begins with it, or all of them begin with an earlier trigger"
                raise invalid(f"{path}.triggers[{number}]", problem)
            yield Alternative(trigger, f"({' | '.join(forms[trigger])})")

    def _either(self, alternatives: Iterable[Alternative]) -> str:
        """Return the alternatives as one expression."""
        write = self.markers.write
        forms = [rest if marker is None else f"{write(marker)} {rest}" for marker, rest in alternatives]
        forms = [form or '""' for form in dict.fromkeys(form.strip() for form in forms)]
        return forms[0] if len(forms) == 1 else f"({' | '.join(forms)})" if forms else ""


def constraint(builder: ConstraintBuilder, value: dict[str, Any] | str, param: str) -> Constraint:
    """Return the constraint of a structural tag, which may be given as text. Raises InvalidValueError."""
    tag = _parse_tag(value, param)
    format = tag.to_format(param)
    for index, structure in enumerate(tag.structures or ()):
        check_schema(structure.schema_, f"{param}.structures[{index}].schema")
    _check_parts(format, f"{param}.format")
    writer = TagGrammar(builder, "structures" if tag.structures else "tags")
    grammar = writer.write(format, param if tag.structures else f"{param}.format")
    if not writer.grammars:
        return Constraint(grammar, param)
    parts: list[Any] = [{"name": "answer", "lark_grammar": grammar}]
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
            if isinstance(part, schemas.JSONSchemaPart):
                check_schema(part.json_schema, param)
        level = [inner for part in level for inner in schemas.inner_parts(part)]


def _parse_tag(tag: dict[str, Any] | str, param: str) -> schemas.StructuralTag:
    value = parse_object(tag, param) if isinstance(tag, str) else tag
    try:
        return schemas.StructuralTag.model_validate(value)
    except ValidationError as error:
        *outer, last = param.split(".")
        body: Any = {last: value}
        for name in reversed(outer):
            body = {name: body}
        errors = [{**each, "loc": ("body", *outer, last, *each["loc"])} for each in error.errors()]
        raise from_validation_error(errors, body) from error
