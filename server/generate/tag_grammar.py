"""The grammar of a tree of parts of an answer, vLLM's structural tags, in llguidance's dialect of Lark.

A lexer takes as much text as it can, so a free text has to know what ends it: each part is written together with what
follows it. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server.generate.json_schema import followable
from server.generate.tool_grammar import ANYTHING, Marks
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


Following = Sequence[Head]  # the ways in which what follows may begin; empty: nothing follows
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

    def write(self, format: Format) -> str:
        """Raises StructuralTagError."""
        start = _either(self._heads(format, (), "format"), self.marks)
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules]) + "\n"

    def _rule(self, body: str) -> str:
        """The name of a rule for it, so that what stands in several places is written once."""
        if not body:
            return ""
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _heads(self, format: Format, following: Following, place: str) -> list[Head]:
        """The ways in which the part may begin, with all that follows."""
        match format:
            case ConstString():
                rest = self._rule(_either(following, self.marks))
                return [Head(format.value, rest)] if format.value else list(following) or [Head(None, "")]
            case SequencePart():
                heads = list(following)
                for index in reversed(range(len(format.elements))):
                    heads = self._heads(format.elements[index], heads, f"{place}.elements[{index}]")
                return heads
            case OrPart():
                parts = enumerate(format.elements)
                return [head for i, part in parts for head in self._heads(part, following, f"{place}.elements[{i}]")]
            case OptionalPart():
                return [*self._heads(format.content, following, f"{place}.content"), *(following or [Head(None, "")])]
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
        rest = self._rule(_either(following, self.marks))
        ends = [head for end in tag.ends for head in ([Head(end, rest)] if end else following or [Head(None, "")])]
        if not any(tag.ends) and not following:
            ends = []
        return _either(self._heads(tag.content, ends, f"{place}.content"), self.marks)

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
            self.rules.append(self.marks.up_to(name, text, mark))
            yield name, rest

    def _terminal(self, excludes: Sequence[str]) -> str:
        name = f"TEXT_{len(self.rules)}"
        without = f" & ~/{ANYTHING}({'|'.join(map(_escaped, excludes))}){ANYTHING}/" if excludes else ""
        self.rules.append(f"{name}: /{ANYTHING}/{without}")
        return name

    def _triggered(self, format: TriggeredTags, following: Following, place: str) -> str:
        """Tags in any text; one that has to be is the beginning."""
        text = self._terminal(format.excludes)
        by_trigger = list(self._by_trigger(format, place))
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
        return self._rule(_either([head for of_tag in heads for head in of_tag], self.marks))


def _either(heads: Following, marks: Marks) -> str:
    """The ways in which something may begin, as one expression."""
    forms = [rest if mark is None else f"{marks.write(mark)} {rest}" for mark, rest in heads]
    forms = [form or '""' for form in dict.fromkeys(form.strip() for form in forms)]
    return forms[0] if len(forms) == 1 else f"({' | '.join(forms)})" if forms else ""


def _trigger_of(tag: TagPart, triggers: Sequence[str]) -> str | None:
    """The first trigger that it begins with."""
    return next((trigger for trigger in triggers if tag.begin.startswith(trigger)), None)


def _escaped(text: str) -> str:
    return re.sub(r"[\W]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
