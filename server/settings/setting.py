"""One row of the table of settings, and the types of its values: how each is parsed, and which limits it has.

A parser accepts text (from flags and the environment) and the value that YAML reads from the same text.
"""

import dataclasses
import datetime
import difflib
import ipaddress
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

ENV_PREFIX = "LIGHTWELL_"
ADAPTER_NAME = r"[\w./:@+-]{1,128}"  # without comma and =, which separate items and names in lists of adapters

MODELS, ENGINE, API, ACCESS, LIMITS = "Models", "Engine", "API", "Access", "Limits"
MEMORY, LORA, LOGS = "Memory and scheduling", "LoRA adapters", "Logs and metrics"
GROUPS = (MODELS, ENGINE, API, ACCESS, LIMITS, MEMORY, LORA, LOGS)  # in help and documentation

MAX_SHOWN = 200  # characters of an invalid value
MIN_SIMILARITY = 0.7

Num = TypeVar("Num", int, float)


@dataclasses.dataclass(frozen=True)
class ValueType:
    """A type of setting value: its parser, and its description in error messages and help."""

    expected: str  # names the type and its limits; completes "expected ..."
    parse: Callable[[object], Any]  # takes text or a YAML value; raises ValueError
    metavar: str | None = None
    is_list: bool = False
    options: tuple[str, ...] = ()  # all accepted values, if they are few


class ExplainedError(ValueError):
    """An invalid value, with a message for the user."""


def non_empty_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError
    return value


def _header_key(value: object) -> str:
    """Return a key without spaces around it, which no header keeps. Raises ValueError for characters beyond ASCII."""
    key = non_empty_text(value).strip()
    if not key.isascii():
        raise ValueError
    return key


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError from None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all numbers
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _int(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError


_UNITS = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
}


def parse_size(value: object) -> int:
    """Return the number of bytes in `268435456`, `256MiB`, `256M` (both powers of 1024) or `256MB` (powers of 1000).

    Raises ValueError.
    """
    if not isinstance(value, str):
        return _int(value)
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([a-z]*)", value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"not a size: {value!r}")
    return int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]


def format_size(num_bytes: int) -> str:
    """Format a number of bytes exactly, with the largest unit that divides it: 10485760 is `10MiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)


def _within(parse: Callable[[object], Num], low: float, high: float) -> Callable[[object], Num]:
    def checked(value: object) -> Num:
        number = parse(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return checked


def integer(low: int, high: int | None = None) -> ValueType:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return ValueType(expected, _within(_int, low, 2**31 - 1 if high is None else high), "N")


def number(low: float, high: float) -> ValueType:
    return ValueType(f"a number from {low:g} to {high:g}", _within(_number, low, high), "X")


def seconds(low: float, high: float = 86400) -> ValueType:
    return ValueType(f"a number of seconds from {low:g} to {high:g}", _within(_number, low, high), "SECONDS")


def size(low: int) -> ValueType:
    expected = f"a size in bytes of at least {format_size(low)}, such as 1073741824, 256MiB or 1GiB"
    return ValueType(expected, _within(parse_size, low, 2**50), "SIZE")


def choice(metavar: str, *options: str | int) -> ValueType:
    by_text = {str(option): option for option in options}

    def parse(value: object) -> str | int:
        text = "off" if value is False else str(value)  # YAML reads a bare `off` as False
        if text not in by_text:
            raise ValueError
        return by_text[text]

    return ValueType(f"one of {', '.join(by_text)}", parse, metavar, options=tuple(by_text))


def pattern(expected: str, regex: str, metavar: str) -> ValueType:
    def parse(value: object) -> str:
        text = non_empty_text(value)
        if re.fullmatch(regex, text) is None:
            raise ValueError
        return text

    return ValueType(expected, parse, metavar)


def many(kind: ValueType) -> ValueType:
    """Return the type of a list of values, of which one may stand alone."""

    def parse(value: object) -> tuple[Any, ...]:
        return tuple(kind.parse(item) for item in (value if isinstance(value, list | tuple) else [value]))

    return dataclasses.replace(kind, parse=parse, is_list=True)


def networks(metavar: str) -> ValueType:
    """Return the type of a list of addresses and networks, or `*` for all."""

    def parse(value: object) -> tuple[str, ...]:
        items = many(text(metavar)).parse(value)
        return items if items == ("*",) else tuple(str(ipaddress.ip_network(item, strict=False)) for item in items)

    return ValueType("an address such as 10.0.0.1, a network such as 10.0.0.0/8, or *", parse, metavar, is_list=True)


def nothing(problem: str) -> ValueType:
    """Return the type of a setting that accepts no value. `problem` is the message for the user."""

    def parse(value: object) -> str:
        raise ExplainedError(problem)

    return ValueType("", parse)


BOOLEAN = ValueType("true or false", _boolean)
INT64 = ValueType("a 64-bit integer", _within(_int, -(2**63), 2**63 - 1), "N")


def text(metavar: str) -> ValueType:
    return ValueType("non-empty text", non_empty_text, metavar)


HEADER_KEY = ValueType("a non-empty key of printable ASCII characters", _header_key, "KEY")


# A row.


class SettingsError(ValueError):
    """An invalid setting. The message names the setting, its source, and the values that it accepts."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table. `name` and `default` are taken from the field of `Settings`."""

    value_type: ValueType
    help: str
    group: str = ""  # of the class or the part that declares it
    secret: bool = False  # the value is never shown
    positional: bool = False
    singular: str = ""  # of the name, for the flag of a list; empty: the same
    name: str = ""
    default: Any = None

    @property
    def key(self) -> str:
        """Key in the config file."""
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else f"--{self.singular or self.key}"

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def description(self) -> str:
        """The help text without its last period, followed by the accepted values if they are few."""
        options = f" ({', '.join(self.value_type.options)})" if self.value_type.options else ""
        return self.help.removesuffix(".") + options

    @property
    def default_text(self) -> str:
        """The default as a user would write it; empty if there is none."""
        if self.default is None or self.default == ():
            return ""
        if self.value_type.metavar == "SIZE":
            return format_size(self.default)
        return str(self.default).lower() if self.is_switch else str(self.default).removesuffix(".0")

    def parse(self, value: object, source: str) -> Any:
        """Parse a value from `source`, which the message of an error names. Raises SettingsError."""
        try:
            return self.value_type.parse(value)
        except ExplainedError as error:
            raise SettingsError(f"{source}: {error}") from None
        except ValueError:
            got = "" if self.secret else f", got {_shown(value)}"
            hint = ": put it in quotes" if self._would_accept_text_of(value) else ""
            raise SettingsError(f"{source}: expected {self.value_type.expected}{got}{hint}") from None

    def _would_accept_text_of(self, value: object) -> bool:
        """Return whether the value would be valid if YAML had not read it as a number, a boolean or a date."""
        text = _as_text(value)
        try:
            self.value_type.parse(text)
        except ValueError:
            return False
        return text != value


def _shown(value: object) -> str:
    """Return a value as the user may have written it, or its beginning if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _as_text(value: object) -> object:
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return str(value) if isinstance(value, int | float | datetime.date) else value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question about the known name that is most like `name`, or "" if none is."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=MIN_SIMILARITY)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
