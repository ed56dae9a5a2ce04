"""Read arguments that are written as literals of a programming language, in text that arrives in pieces."""

import json
import re
from collections.abc import Mapping
from typing import Any

from server.text.parsers.argument_values import NUMBER, ArgumentSchema, Schema
from server.text.parsers.call_head import UNDECIDED, KeyNames
from server.text.parsers.markers import Markers
from server.text.parsers.tool_formats import KEY, LiteralArguments

MAX_WORD_CHARS = 512
_WORD = re.compile(r"""[^\s,:=(){}\[\]"'<]*""")
_KEY = re.compile(r"""[^\n,:=(){}\[\]"'<]*""")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[^ux])", re.DOTALL)
_NO_PROPERTIES: Mapping[str, Any] = {}
_OPENERS = {"[": "]", "{": "}", "(": ")"}
_JSON_OF = {"]": "]", "}": "}", ")": "]"}  # closing brackets in JSON


class LiteralArgumentsReader:
    """Converts arguments to JSON, token by token. Text that is no literal ends the arguments.

    A state machine: each state is a method that reads from `unread`, and returns False if it needs more text.
    """

    def __init__(self, syntax: LiteralArguments, schema: ArgumentSchema | None = None) -> None:
        """`schema` is that of the tool's parameters."""
        self.unread = ""
        self._syntax = syntax
        self._schema = schema or ArgumentSchema({})
        words = dict(zip(syntax.words, ("true", "false", "null"), strict=True))
        self._words = {"true": "true", "false": "false", "null": "null"} | words
        self._state = self._begin
        self._json: list[str] = []
        self._is_complete = False
        self._closers = [syntax.close]  # of the open brackets, the innermost last
        self._is_first = True  # in the innermost bracket
        self._separator = ""  # in front of the next item, in JSON
        self._needs_value = False  # after a key
        self._schemas: list[Schema] = []  # of what is in the open brackets
        self._name = ""  # the last key
        self._is_key = False  # whether the string that is read is a key
        self._quote = ""
        self._ends = Markers(())

    def begins_with(self, text: str) -> bool | None:
        return True

    def push(self, text: str) -> tuple[str, bool]:
        self.unread += text
        while not self._is_complete and self._state():
            pass
        json, self._json = "".join(self._json), []
        return json, self._is_complete

    # The states.

    def _begin(self) -> bool:
        self._json.append("{")
        self._enter(self._schema.root)
        self._state = self._next
        return True

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
            self._state = self._item
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
        self._state = self._item
        return True

    def _item(self) -> bool:
        self._state = self._key if self._in_object else self._value
        return True

    def _key(self) -> bool:
        known = self._keys.find(self.unread, self._assign)
        quote = self._find_quote()
        if known is UNDECIDED or (known is None and quote is None):
            return False
        if known is not None:
            self._read(known.end or 0)
            return self._end_key(known.slots[KEY])
        if quote:
            self._is_key, self._name = True, ""
            return self._begin_string(quote)
        word = self._read_word(_KEY)
        if word is None:
            return False
        return self._end_key(word.rstrip()) if word.strip() else self._fail()

    def _end_key(self, name: str) -> bool:
        self._name = name
        self._emit(json.dumps(name, ensure_ascii=False))
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
            self._enter(self._schema_of_value())
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
        self._name += text if self._is_key else ""
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

    # Helpers of the states.

    @property
    def _in_object(self) -> bool:
        return len(self._closers) == 1 or self._closers[-1] == "}"

    @property
    def _assign(self) -> str:
        """The character between a key and its value."""
        return self._syntax.after_key if len(self._closers) == 1 else ":"

    def _enter(self, schema: Any) -> None:
        """Read on in an object or an array with this schema."""
        self._schemas.append(self._schema.resolve(schema))

    @property
    def _properties(self) -> Mapping[str, Any]:
        properties = self._schemas[-1].get("properties")
        return properties if isinstance(properties, Mapping) else _NO_PROPERTIES

    @property
    def _keys(self) -> KeyNames:
        """The keys of the object that is read."""
        return self._schema.key_names(self._properties)

    def _schema_of_value(self) -> Any:
        return self._properties.get(self._name) if self._in_object else self._schemas[-1].get("items")

    def _read(self, num_chars: int) -> str:
        text, self.unread = self.unread[:num_chars], self.unread[num_chars:]
        return text

    def _skip_space(self) -> str:
        self.unread = self.unread.lstrip()
        return self.unread[:1]

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
        self._schemas.pop()
        self._json.append("}" if not self._closers else _JSON_OF[closer])
        self._is_first, self._separator, self._state = False, "", self._next
        self._is_complete = not self._closers

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
