"""What a setting is, and how its values are read: kinds of values and their limits.

Each parser takes text (flags, environment) and what YAML makes of the same text.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

Num = TypeVar("Num", int, float)

ENV_PREFIX = "LIGHTWELL_"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How values of one sort are read."""

    expected: str  # completes "expected ...", and so says the limit
    parse: Callable[[object], Any]  # from text or from a YAML value; raises ValueError
    metavar: str | None = None
    is_list: bool = False
    options: tuple[str, ...] = ()  # the few values there are


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError
    return value


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(item) for item in (value if isinstance(value, list | tuple) else [value]))


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
    number = float(value)
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
    """Bytes of `268435456`, `256MiB`, `256M` (both powers of 1024) or `256MB` (powers of 1000). Raises ValueError."""
    if not isinstance(value, str):
        return _int(value)
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([a-z]*)", value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"not a size: {value!r}")
    return int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]


def format_size(num_bytes: int) -> str:
    """The shortest exact form: 10485760 is `10MiB`."""
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


def integer(low: int, high: int | None = None) -> Kind:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return Kind(expected, _within(_int, low, 2**31 - 1 if high is None else high), "N")


def number(low: float, high: float) -> Kind:
    return Kind(f"a number from {low:g} to {high:g}", _within(_number, low, high), "X")


def seconds(low: float, high: float = 86400) -> Kind:
    return Kind(f"seconds from {low:g} to {high:g}", _within(_number, low, high), "SECONDS")


def size(low: int) -> Kind:
    expected = f"bytes such as 1073741824, 1GiB or 256MiB, at least {format_size(low)}"
    return Kind(expected, _within(parse_size, low, 2**50), "SIZE")


def choice(metavar: str, *options: str) -> Kind:
    def parse(value: object) -> str:
        if value is False:  # what YAML makes of off
            value = "off"
        if value not in options:
            raise ValueError
        return str(value)

    return Kind(f"one of {', '.join(options)}", parse, metavar, options=options)


def int_choice(*options: int) -> Kind:
    def parse(value: object) -> int:
        number = _int(value)
        if number not in options:
            raise ValueError
        return number

    names = tuple(str(option) for option in options)
    return Kind(f"one of {', '.join(names)}", parse, "N", options=names)


def pattern(expected: str, regex: str, metavar: str, *, is_list: bool = False) -> Kind:
    def parse_one(value: object) -> str:
        text = _text(value)
        if re.fullmatch(regex, text) is None:
            raise ValueError
        return text

    def parse_all(value: object) -> tuple[str, ...]:
        return tuple(parse_one(item) for item in _texts(value))

    return Kind(expected, parse_all if is_list else parse_one, metavar, is_list)


class _NamedPath(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: str
    base_model_name: str | None = None  # ignored: there is one


def named_paths(expected: str, name_regex: str) -> Kind:
    """A list of NAME=PATH, each of which may be given as vLLM's JSON: {"name": NAME, "path": PATH}."""

    def parse_one(value: object) -> str:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            name, _, path = _text(value).partition("=")
        else:
            name, path = _from_json(value)
        if re.fullmatch(name_regex, name) is None:
            raise ValueError
        return f"{name}={_text(path)}"

    def parse(value: object) -> tuple[str, ...]:
        return tuple(parse_one(item) for item in (value if isinstance(value, list | tuple) else [value]))

    return Kind(expected, parse, "NAME=PATH", is_list=True)


def _from_json(value: object) -> tuple[str, str]:
    try:
        module = (
            msgspec.json.decode(value, type=_NamedPath)
            if isinstance(value, str)
            else msgspec.convert(value, _NamedPath)
        )
    except msgspec.MsgspecError:
        raise ValueError from None
    return module.name, module.path


BOOLEAN = Kind("true or false", _boolean)
INT64 = Kind("a 64-bit integer", _within(_int, -(2**63), 2**63 - 1), "N")


def text(metavar: str) -> Kind:
    return Kind("text that is not empty", _text, metavar)


def texts(metavar: str, expected: str = "text that is not empty") -> Kind:
    return Kind(expected, _texts, metavar, is_list=True)


class SettingsError(ValueError):
    """A setting that cannot be: the message names it, where it came from, and what it may be."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table. `name` and `default` are taken from the field of `Settings`."""

    group: str
    kind: Kind
    help: str
    secret: bool = False  # the value is never shown
    positional: bool = False
    name: str = ""
    default: Any = None

    @property
    def key(self) -> str:
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else f"--{self.key}"

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def text(self) -> str:
        """What it means, as one phrase."""
        options = f": {', '.join(self.kind.options)}" if self.kind.options else ""
        return self.help.removesuffix(".") + options

    @property
    def default_text(self) -> str:
        """The default as a reader would write it; empty where there is none."""
        if self.default is None or self.default == ():
            return ""
        if self.kind.metavar == "SIZE":
            return format_size(self.default)
        return str(self.default).lower() if self.is_switch else str(self.default).removesuffix(".0")

    def read(self, value: object, source: str) -> Any:
        """Parse a value that came from `source`. Raises SettingsError."""
        try:
            return self.kind.parse(value)
        except ValueError:
            got = "" if self.secret else f", got {value!r}"
            raise SettingsError(f"{source}: expected {self.kind.expected}{got}") from None
