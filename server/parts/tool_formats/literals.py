"""Arguments that are literals of a programming language: the syntax, its reader and its grammar."""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from server.parts.tool_formats.argument_schema import NUMBER, STRING
from server.parts.tool_formats.grammar import ArgumentGrammar, Property, listed_values, times
from server.parts.tool_formats.named import ArgumentsReader, NamedArguments
from server.text.parsers.answer_parts import PieceReader
from server.text.parsers.markers import Markers, MarkerWriter, literal
from server.text.parsers.tool_formats import Schema

MAX_WORD_CHARS = 512
_WORD = re.compile(r"""[^\s,:=(){}\[\]"'<]*""")
_KEY = re.compile(r"""[^\n,:=(){}\[\]"'<]*""")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[^ux])", re.DOTALL)
_OPENERS = {"[": "]", "{": "}", "(": ")"}


class LiteralArguments(NamedArguments, msgspec.Struct, frozen=True, tag=True):
    """The arguments are literals of a programming language, such as the keyword arguments of a Python call.

    Attributes:
        quotes: what strings are written between.
        after_key: the character between a parameter's name and its value.
        close: the character that ends the arguments.
        has_escapes: strings have backslash escapes.
        words: the spellings of true, false and null.
    """

    quotes: tuple[str, ...]
    after_key: str
    close: str
    separator: str = ", "
    has_escapes: bool = True
    words: tuple[str, str, str] = ("true", "false", "null")

    @property
    def texts(self) -> tuple[str, ...]:
        return self.quotes

    def arguments_reader(self, schema: Any) -> "LiteralArgumentsReader":
        return LiteralArgumentsReader(self)

    def write_rules(self, name: str, schema: Schema, markers: MarkerWriter) -> list[str]:
        return LiteralGrammar(name, self, schema, markers).write()


PYTHON = LiteralArguments(("'", '"'), "=", ")", words=("True", "False", "None"))
GEMMA = LiteralArguments(('<|"|>',), ":", "}", separator=",", has_escapes=False)


class LiteralArgumentsReader(PieceReader, ArgumentsReader):
    """Converts arguments to JSON, token by token. Text that is no literal ends the arguments."""

    def __init__(self, syntax: LiteralArguments) -> None:
        super().__init__(self._next)
        self._syntax = syntax
        words = dict(zip(syntax.words, ("true", "false", "null"), strict=True))
        self._words = {"true": "true", "false": "false", "null": "null"} | words
        self._json = ["{"]
        self._closers = [syntax.close]  # of the open brackets, the innermost last
        self._is_first = True  # in the innermost bracket
        self._separator = ""  # in front of the next item, in JSON
        self._needs_value = False  # after a key
        self._is_key = False  # whether the string that is read is a key
        self._quote = ""
        self._ends = Markers(())

    def push(self, text: str) -> tuple[str, bool]:
        self._run(text)
        json, self._json = "".join(self._json), []
        return json, not self._closers

    # The states.

    def _next(self) -> bool:
        """Read a separator or the end of the innermost bracket, or find that an item begins."""
        char = self._skip_space()
        if char == "":
            return False
        if char == self._closers[-1]:
            self._read(1)
            self._close()
        elif char == "," and not self._is_first:
            self._read(1)
            self._is_first, self._state = True, self._next_item
        elif self._is_first:
            self._state = self._key if self._in_object else self._value
        else:
            return self._fail()
        return True

    def _next_item(self) -> bool:
        """Read the item after a comma, if there is one."""
        char = self._skip_space()
        if char == "":
            return False
        if char == self._closers[-1]:
            self._is_first, self._state = False, self._next
            return True
        self._separator = ", "
        self._state = self._key if self._in_object else self._value
        return True

    def _key(self) -> bool:
        if (quote := self._find_quote()) is None:
            return False
        if quote:
            self._is_key = True
            return self._begin_string(quote)
        word = self._read_word(_KEY)
        if word is None:
            return False
        if not word.strip():
            return self._fail()
        self._emit(json.dumps(word.rstrip(), ensure_ascii=False))
        self._state = self._after_key
        return True

    def _after_key(self) -> bool:
        char = self._skip_space()
        if char == "":
            return False
        self._emit(": ")
        if char != self._assign:
            return self._fail()
        self._read(1)
        self._state = self._value
        return True

    def _value(self) -> bool:
        char = self._skip_space()
        quote = self._find_quote()
        if char == "" or quote is None:
            return False
        if quote:
            self._is_key = False
            return self._begin_string(quote)
        if char in _OPENERS:
            self._read(1)
            self._emit("{" if char == "{" else "[")
            self._closers.append(_OPENERS[char])
            self._is_first, self._state = True, self._next
            return True
        word = self._read_word(_WORD)
        if word is None:
            return False
        if not word:
            return self._fail()
        self._emit(self._convert(word))
        self._is_first, self._state = False, self._next
        return True

    def _string(self) -> bool:
        """Read a string up to its end or the next escape."""
        match = self._ends.find(self.unread)
        end = len(self.unread) - self._ends.num_partial(self.unread) if match is None else match.start()
        text = self._read(end)
        self._json.append(json.dumps(text, ensure_ascii=False)[1:-1])
        if match is None:
            return False
        if match[0] == "\\":
            return self._read_escape()
        self._read(len(self._quote))
        self._json.append('"')
        self._is_first = False
        self._state = self._after_key if self._is_key else self._next
        return True

    def _end(self) -> bool:
        return False

    # Helpers of the states.

    @property
    def _in_object(self) -> bool:
        return len(self._closers) == 1 or self._closers[-1] == "}"

    @property
    def _assign(self) -> str:
        """The character between a key and its value."""
        return self._syntax.after_key if len(self._closers) == 1 else ":"

    def _find_quote(self) -> str | None:
        """Return the quote that the text begins with, "" if it begins with none, or None if that needs more text."""
        text = self.unread
        for quote in self._syntax.quotes:
            if text.startswith(quote):
                return quote
            if quote.startswith(text):
                return None
        return ""

    def _begin_string(self, quote: str) -> bool:
        self._read(len(quote))
        self._quote = quote
        self._ends = Markers([quote, "\\"] if self._syntax.has_escapes else [quote])
        self._emit('"')
        self._state = self._string
        return True

    def _read_escape(self) -> bool:
        """Read a backslash escape, which has up to six characters."""
        if self.unread[1:2] in ("", "u", "x") and len(self.unread) < len("\\u0000"):
            return False
        match = _ESCAPE.match(self.unread)
        self._json.append(_escape_of(self._read(1 if match is None else len(match[0]))))
        return True

    def _read_word(self, pattern: re.Pattern[str]) -> str | None:
        """Read a word; return None if it may go on."""
        match = pattern.match(self.unread)
        assert match is not None
        if match.end() == len(self.unread) and match.end() <= MAX_WORD_CHARS:
            return None
        return self._read(match.end())

    def _convert(self, word: str) -> str:
        if word in self._words:
            return self._words[word]
        return word if NUMBER.fullmatch(word) else json.dumps(word, ensure_ascii=False)

    def _emit(self, json: str) -> None:
        """Write a part of an item, and what separates the item from the one before it."""
        self._json.append(self._separator + json)
        self._separator = ""
        self._needs_value = json == ": "

    def _close(self) -> None:
        closer = self._closers.pop()
        self._json.append("}" if closer == "}" or not self._closers else "]")
        self._is_first, self._separator = False, ""
        self._state = self._next if self._closers else self._end

    def _fail(self) -> bool:
        """Close all brackets, so that the arguments remain valid JSON, and end the arguments."""
        if self._needs_value:
            self._json.append("null")
        while self._closers:
            self._close()
        return False


def _escape_of(text: str) -> str:
    """Return a backslash escape as it is written in a JSON string. Text that is no escape is kept."""
    char = text[1:2]
    if char == "x":
        return f"\\u00{text[2:]}" if len(text) == 4 else json.dumps(text)[1:-1]
    if char == "u":
        return text if len(text) == 6 else json.dumps(text)[1:-1]
    if char == "\n":
        return ""
    if char == "'":
        return "'"
    return text if char and char in '"\\/bfnrt' else json.dumps(text, ensure_ascii=False)[1:-1]


class LiteralGrammar(ArgumentGrammar):
    """Writes the rules of literals."""

    def __init__(self, name: str, syntax: LiteralArguments, schema: Schema, markers: MarkerWriter) -> None:
        super().__init__(name, schema, markers, syntax.separator)
        self.syntax = syntax

    def argument(self, each: Property, any_name: str) -> str:
        return self._pair(each, any_name, self.syntax.after_key)

    def _pair(self, each: Property, any_name: str, after_key: str) -> str:
        return f"{self.key(each, any_name)} {literal(after_key)} {self._literal(each.schema)}"

    def _literal(self, schema: Any) -> str:
        """Return the name of the rule of a value as a literal."""
        return self.named(f"literal {json.dumps(schema)}", lambda: " | ".join(self._literals(schema)))

    def _literals(self, schema: Any) -> Iterator[str]:
        types = self.schema.types(schema)
        words = zip(("true", "false", "null"), self.syntax.words, (True, False, None), strict=True)
        if self.syntax.has_escapes:  # strings, arrays and objects are literals as they are in JSON
            if others := types - {"boolean", "null"}:
                yield self.json(self.narrow(schema, others))
        else:
            if "string" in types:
                quote = self.syntax.quotes[0]
                yield f"{self.markers.write(quote)} {self.text(self.narrow(schema, STRING), quote)}"
            if numbers := types & {"integer", "number"}:
                yield self.json(self.narrow(schema, numbers))
            if "array" in types:
                yield self._literal_array(self.narrow(schema, frozenset(("array",))))
            if "object" in types:
                for each in self.objects(self.narrow(schema, frozenset(("object",)))):
                    yield f'"{{" {self.members(each, lambda one, name: self._pair(one, name, ":"))} "}}"'
        allowed = listed_values(self.schema.resolve(schema))
        for json_word, word, value in words:
            kind = "null" if json_word == "null" else "boolean"
            if kind in types and (allowed is None or any(each is value for each in allowed)):
                yield literal(word)

    def _literal_array(self, schema: Schema) -> str:
        item = self._literal(schema.get("items", {}))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        more = f"({literal(self.syntax.separator)} {item})" + times(
            {"minItems": max(least - 1, 0)} | ({} if most is None else {"maxItems": most - 1})
        )
        return f'"[" {item} {more} "]"' + ("" if least else ' | "[]"')
