"""The grammar of a tree of parts of an answer, vLLM's structural tags, in llguidance's dialect of Lark.

A lexer takes as much text as it can, so a free text has to know what ends it: each part is written together with what
follows it. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.grammar.matcher import MAX_GRAMMAR_BYTES
from server.constrained.json_schema import escaped, followable
from server.constrained.tool_grammar import ANYTHING, Marks
from server.schemas.structural_tag import (
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
    TagPart,
    TagsWithSeparator,
    TriggeredTags,
)


class StructuralTagError(ValueError):
    """A part that cannot be followed where it stands. The message is fit for the client that sent it."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


class Head(NamedTuple):
    """One way in which what follows may begin: with a mark, if that is a text, and then with the rest."""

    mark: str | None
    rest: str


Following = tuple[Head, ...]  # the ways in which what follows may begin; empty: nothing follows
ANYTHING_ELSE: Following = (Head(None, ""),)  # it is not known what follows


@dataclass(slots=True)
class TagGrammar:
    """Writes the rules of a tree of parts.

    Attributes:
        marks: writes texts in which control tokens may be.
        json_options: how llguidance reads schemas.
        regex: writes a regular expression as a terminal.
        grammars: the parts that are grammars of their own, by the names under which the rules have them.
    """

    marks: Marks
    json_options: Mapping[str, Any]
    regex: Callable[[str], str]
    grammars: dict[str, str] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)  # body of a rule -> its name
    _tags: dict[tuple[int, Following], str] = field(default_factory=dict)  # a tag and what follows -> its inside
    _num_chars: int = 0  # of the rules

    def write(self, format: Format) -> str:
        """Raises StructuralTagError."""
        start = _either(self._heads(format, (), "format"), self.marks)
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules]) + "\n"

    def _add(self, rule: str) -> None:
        """Raises StructuralTagError where the grammar becomes larger than any that is taken."""
        self.rules.append(rule)
        self._num_chars += len(rule)
        if self._num_chars > MAX_GRAMMAR_BYTES:
            raise StructuralTagError("format", "its grammar would be too large")

    def _rule(self, body: str) -> str:
        """The name of a rule for it, so that what stands in several places is written once."""
        if body and body not in self._names:
            self._names[body] = f"part_{len(self.rules)}"
            self._add(f"{self._names[body]}: {body}")
        return self._names.get(body, "")

    def _heads(self, format: Format, following: Following, place: str) -> Following:
        """The ways in which the part may begin, with all that follows, each once."""
        return tuple(dict.fromkeys(self._all_heads(format, following, place)))

    def _all_heads(self, format: Format, following: Following, place: str) -> Sequence[Head]:
        match format:
            case ConstString():
                rest = self._rule(_either(following, self.marks))
                return [Head(format.value, rest)] if format.value else following or ANYTHING_ELSE
            case SequencePart():
                heads = following
                for index in reversed(range(len(format.elements))):
                    heads = self._heads(format.elements[index], heads, f"{place}.elements[{index}]")
                return heads
            case OrPart():
                parts = enumerate(format.elements)
                return [head for i, part in parts for head in self._heads(part, following, f"{place}.elements[{i}]")]
            case OptionalPart():
                return [*self._heads(format.content, following, f"{place}.content"), *(following or ANYTHING_ELSE)]
            case TagPart():
                return [Head(format.begin, self._rule(self._inside(format, following, place)))]
            case AnyText():
                return [Head(None, self._text(format.excludes, following, place))]
            case TriggeredTags():
                return [Head(None, self._triggered(format, following, place))]
        rest = self._rule(_either(following, self.marks))
        return [Head(None, f"{self._alone(format, place)} {rest}")]

    def _alone(self, format: Format, place: str) -> str:
        """A part that ends by itself."""
        match format:
            case JSONSchemaPart():
                return self._rule(f"%json {json.dumps({**followable(format.json_schema), **self.json_options})}")
            case RegexPart():
                return self._rule(self.regex(format.pattern))
            case GrammarPart():
                name = f"grammar_{len(self.grammars)}"
                self.grammars[name] = format.grammar
                return f"@{name}"
            case PlusPart() | StarPart():
                repeated = _either(self._heads(format.content, ANYTHING_ELSE, f"{place}.content"), self.marks)
                return f"({repeated}){'+' if isinstance(format, PlusPart) else '*'}"
            case TagsWithSeparator():
                return self._separated(format, place)
        raise TypeError(format)

    def _inside(self, tag: TagPart, following: Following, place: str) -> str:
        """A tag without its beginning."""
        key = (id(tag), following)
        if key not in self._tags:
            rest = self._rule(_either(following, self.marks))
            ends = [head for end in tag.ends for head in ((Head(end, rest),) if end else following or ANYTHING_ELSE)]
            if not any(tag.ends) and not following:
                ends = []
            heads = self._heads(tag.content, tuple(dict.fromkeys(ends)), f"{place}.content")
            self._tags[key] = _either(heads, self.marks)
        return self._tags[key]

    def _text(self, excludes: Sequence[str], following: Following, place: str) -> str:
        """Any text up to what follows."""
        text = self._terminal(excludes)
        if not following:
            return text
        return f"({' | '.join(f'{begin} {rest}' for begin, rest in self._texts_up_to(text, following, place))})"

    def _texts_up_to(self, text: str, following: Following, place: str) -> Iterator[tuple[str, str]]:
        for mark, rest in following:
            if mark is None:
                raise StructuralTagError(place, "what follows any text has to begin with a text that ends it")
            name = f"up_to_{len(self.rules)}"
            self._add(self.marks.up_to(name, text, mark))
            yield name, rest

    def _terminal(self, excludes: Sequence[str]) -> str:
        name = f"TEXT_{len(self.rules)}"
        without = f" & ~/{ANYTHING}({'|'.join(map(escaped, excludes))}){ANYTHING}/" if excludes else ""
        self._add(f"{name}: /{ANYTHING}/{without}")
        return name

    def _triggered(self, format: TriggeredTags, following: Following, place: str) -> str:
        """Tags in any text; one that has to be is the beginning."""
        text = self._terminal(format.excludes)
        by_trigger = tuple(self._by_trigger(format, place))
        tag = self._rule(" | ".join(map(" ".join, self._texts_up_to(text, by_trigger, place))))
        rest = self._rule(_either(following, self.marks))
        end = self._text(format.excludes, following, place)
        first = self._first_of(format.tags, place) if format.at_least_one else None
        if format.stop_after_first:
            return f"({tag} {rest} | {end})" if first is None else f"{first} {rest}"
        return f"{first or ''} {tag}* {end}"

    def _by_trigger(self, format: TriggeredTags, place: str) -> Iterator[Head]:
        """Each trigger, and what its tags are without it."""
        triggers = [_trigger_of(tag, format.triggers) for tag in format.tags]
        for index, trigger in enumerate(triggers):
            if trigger is None:
                raise StructuralTagError(
                    f"{place}.tags[{index}].begin", "expected it to begin with one of the triggers"
                )
        for number, trigger in enumerate(format.triggers):
            if trigger not in triggers:
                problem = "no tag begins with it, or another trigger comes before"
                raise StructuralTagError(f"{place}.triggers[{number}]", problem)
            forms = [
                f"{self.marks.write(tag.begin[len(trigger) :])} "
                + self._rule(self._inside(tag, ANYTHING_ELSE, f"{place}.tags[{index}]"))
                for index, tag in enumerate(format.tags)
                if triggers[index] == trigger
            ]
            yield Head(trigger, f"({' | '.join(forms)})")

    def _separated(self, format: TagsWithSeparator, place: str) -> str:
        tag = self._first_of(format.tags, place)
        several = tag if format.stop_after_first else f"{tag} ({self.marks.write(format.separator)} {tag})*"
        return f"({several})" if format.at_least_one else f"({several})?"

    def _first_of(self, tags: Sequence[TagPart], place: str) -> str:
        """Any of the tags, without text before."""
        heads = [self._heads(tag, ANYTHING_ELSE, f"{place}.tags[{index}]") for index, tag in enumerate(tags)]
        return self._rule(_either(tuple(head for of_tag in heads for head in of_tag), self.marks))


def _either(heads: Following, marks: Marks) -> str:
    """The ways in which something may begin, as one expression."""
    forms = [rest if mark is None else f"{marks.write(mark)} {rest}" for mark, rest in heads]
    forms = [form or '""' for form in dict.fromkeys(form.strip() for form in forms)]
    return forms[0] if len(forms) == 1 else f"({' | '.join(forms)})" if forms else ""


def _trigger_of(tag: TagPart, triggers: Sequence[str]) -> str | None:
    """The first trigger that it begins with."""
    return next((trigger for trigger in triggers if tag.begin.startswith(trigger)), None)
