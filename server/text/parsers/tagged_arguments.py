"""Read arguments that are written as values between tags, in text that arrives in pieces."""

import json

from server.text.parsers.argument_values import JSON_TYPES, STRING, ArgumentSchema, to_json
from server.text.parsers.call_head import UNDECIDED, Head
from server.text.parsers.markers import Markers
from server.text.parsers.nested_tags import namespace_of, nested_to_json
from server.text.parsers.tool_formats import KEY, TaggedArguments


class TaggedArgumentsReader:
    """Converts arguments to JSON. Values of strings are converted as they arrive, others when they are complete.

    Text that is neither an argument nor white space ends the arguments.
    """

    def __init__(self, syntax: TaggedArguments, schema: ArgumentSchema) -> None:
        """`schema` is that of the tool's parameters."""
        self.unread = ""
        self._syntax = syntax
        self._schema = schema
        after_keys = dict.fromkeys(syntax.after_keys.values()) or [syntax.after_key]
        self._heads = [
            (Head(syntax.before_key + KEY + after_key, schema.parameter_names), after_key) for after_key in after_keys
        ]
        self._state = self._begin
        self._json: list[str] = []
        self._is_complete = False
        self._num_keys = 0
        # The current argument.
        self._key = ""
        self._types = JSON_TYPES
        self._end = Markers(())
        self._begin_tag: str | None = None  # of the value, if it may have members of the same name
        self._depth = 0  # of the value's tags
        self._value: list[str] = []

    def begins_with(self, text: str) -> bool | None:
        return True

    def push(self, text: str) -> tuple[str, bool]:
        self.unread += text
        while self._state():
            pass
        json, self._json = "".join(self._json), []
        return json, self._is_complete

    # The states. Each returns False if it needs more text or the arguments are complete.

    def _begin(self) -> bool:
        self._json.append("{")
        self._state = self._read_key
        return True

    def _read_key(self) -> bool:
        """Read the name of the next argument, or find that there is none."""
        for head, after_key in self._heads:
            match = head.match(self.unread)
            if match is UNDECIDED:
                return False
            if match is not None:
                self.unread = self.unread[match.end :]
                self._begin_value(match.slots[KEY], after_key)
                return True
        self._json.append("}")
        self._is_complete = True
        return False

    def _skip_line_break(self) -> bool:
        """Read the line break before a value."""
        if self.unread:
            self.unread = self.unread.removeprefix("\n")
            self._state = self._read_value
        return bool(self.unread)

    def _read_value(self) -> bool:
        """Read a value up to its end."""
        match = self._end.find(self.unread)
        end = len(self.unread) - self._end.num_partial(self.unread) if match is None else match.start()
        text, self.unread = self.unread[:end], self.unread[end if match is None else match.end() :]
        if self._types == STRING:
            self._json.append(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)
        if match is None:
            return False
        self._depth += 1 if match[0] == self._begin_tag else -1
        if self._depth:
            self._value.append(match[0])
            return True
        self._json.append('"' if self._types == STRING else self._convert("".join(self._value)))
        self._state = self._read_key
        return True

    # Helpers of the states.

    def _begin_value(self, key: str, after_key: str) -> None:
        self._key, self._value = key, []
        self._types = self._schema.parameter_types(key)
        told = frozenset(kind for kind, text in self._syntax.after_keys.items() if text == after_key)
        if told:
            self._types = STRING if told == STRING else (self._types - STRING or JSON_TYPES - STRING)
        end = self._syntax.value_end.replace(KEY, key)
        self._begin_tag, self._depth = None, 1
        if self._is_nested:
            self._begin_tag = f"{namespace_of(self._syntax)}<{key}>"
        ends = [end, "\n" + end] if self._syntax.is_padded else [end]
        self._end = Markers(ends if self._begin_tag is None else [*ends, self._begin_tag])
        self._state = self._skip_line_break if self._syntax.is_padded else self._read_value
        separator, quote = (", " if self._num_keys else ""), ('"' if self._types == STRING else "")
        self._json.append(f"{separator}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._num_keys += 1

    @property
    def _is_nested(self) -> bool:
        """True if the value's members and items are tags."""
        return self._syntax.is_nested and not self._types & STRING

    def _convert(self, text: str) -> str:
        if self._is_nested:
            return nested_to_json(text, self._schema, self._key, self._syntax)
        return to_json(text, self._types)
