"""The syntaxes of tool calls: how they are told from one another in what a chat template renders, and their names.

Objects in JSON are here. The part `tool_formats` adds others, and formats of whole answers.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import or_
from typing import Any

import msgspec

from engine.shared.parts import MissingPartError
from server.part_table import load_module, why_missing
from server.text.parsers.answer_parser import AnswerFormat, ReasoningTags
from server.text.parsers.tool_formats import ID, Arguments, ObjectCall, ToolFormat

PART = "tool_formats"

# What a template gets to render.
QUESTION, CONTENT = "lwquestion", "lwcontent"
NAMES = ("lwtool_a", "lwtool_b")
IDS = ("lwid00001", "lwid00002")  # nine characters, which Mistral's templates require
FIRST, LAST = "lwfirst", "lwlast"
ARGUMENTS: dict[str, Any] = {
    "lwk_a": FIRST,
    "lwk_b": 73,
    "lwk_c": 7.25,
    "lwk_d": True,
    "lwk_e": {"lwmember": "lwinner"},
    "lwk_f": [81, 82],
    "lwk_g": LAST,
}
KEYS = tuple(ARGUMENTS)
TYPES = ("string", "number", "number", "boolean", "object", "array", "string")  # of the arguments

# What the assistant's turn begins with in conversations that are a list of messages with headers.
MESSAGES = "<|start|>assistant<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A call in a rendered text: the text up to the tool's name, up to the arguments, and after them."""

    before: str
    after_name: str
    after: str
    arguments: Arguments


@dataclass(frozen=True, kw_only=True)
class ToolSyntax:
    """A syntax of calls.

    Attributes:
        kind: the class of their arguments.
        name: that of formats of no known family.
        families: text of a format, its name, and fields that the models' other forms need. The first match counts.
        announced: text of a prompt with tools, and the format that it asks for, of templates that do not write the
            calls of earlier messages.
        find: finds a call in a text, in which the name of the tool begins at a position.
    """

    kind: type[Arguments]
    name: str
    families: Sequence[tuple[str, str, Mapping[str, Any]]]
    announced: Sequence[tuple[str, ToolFormat]] = ()
    is_bare: bool = True  # calls need no marker before their bracket
    find: Callable[[str, int, str], FoundCall | None]


@dataclass(frozen=True, kw_only=True)
class AnswerSyntax:
    """A syntax of whole answers.

    Attributes:
        tool_format: how calls are named.
        format: the class of the answers' formats, which has a parser and a grammar.
        tags: what reasoning begins and ends with.
        message_field: the name under which the template reads the reasoning of earlier messages.
        convert: returns messages, and variables of the template, as that expects them.
    """

    tool_format: ToolFormat
    format: Callable[..., AnswerFormat]
    tags: ReasoningTags
    message_field: str
    convert: Callable[[Sequence[dict[str, Any]], dict[str, Any]], tuple[list[dict[str, Any]], dict[str, Any]]]


def decode_at(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value at a position and its end; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except ValueError:
        return None, position


def find_all(text: str, char: str, begin: int = 0) -> list[int]:
    return [index for index in range(begin, len(text)) if text[index] == char]


def find_object(text: str, begin: int, name: str) -> FoundCall | None:
    """Find a call that is a JSON object with the name and the arguments as members."""
    for position in reversed(find_all(text[:begin], "{")):
        value, end = decode_at(text, position)
        if isinstance(value, dict) and name in value.values() and ARGUMENTS in value.values():
            name_key = next(key for key, item in value.items() if item == name)
            arguments_key = next(key for key, item in value.items() if item == ARGUMENTS)
            start = next(p for p in find_all(text, "{", begin) if decode_at(text, p)[0] == ARGUMENTS)
            arguments_end = decode_at(text, start)[1]
            after = re.sub(rf',\s*"\w+":\s*"{ID}"', "", text[arguments_end:end]) + text[end:]
            return FoundCall(text[:begin], text[begin + len(name) : start], after, ObjectCall(name_key, arguments_key))
    return None


OBJECTS = ToolSyntax(
    kind=ObjectCall,
    name="json",
    families=(
        ("[TOOL_CALLS]", "mistral", {}),
        ("<tool_call>", "hermes", {}),
        ("<tool_calls>", "tool_calls", {}),
        ("<TOOLCALL>", "nemotron", {}),
        ("<|START_ACTION|>", "cohere", {}),
        ("Action:", "command_r", {}),
        ("functools", "firefunction", {}),
        ("<|tool_call|>", "granite", {}),
        ("function call", "gigachat", {}),
        ("<|function_call|>", "gigachat", {}),
        (
            '"parameters"',
            "llama3",
            {"triggers": ("<|python_tag|>",), "separator": "; ", "is_bare": True, "several": True},
        ),
    ),
    announced=(
        ("<|tool_call|>", ToolFormat("granite", start="<|tool_call|>[", separator=", ", end="]")),
        ("<|tool|>", ToolFormat("phi4", start="<|tool_call|>[", separator=", ", end="]<|/tool_call|>")),
        ("functools[", ToolFormat("firefunction", start="functools[", separator=", ", end="]")),
    ),
    find=find_object,
)


def missing_part() -> MissingPartError | None:
    """Return what calls need that are no objects in JSON, if it is not installed."""
    return why_missing(PART)


@cache
def tool_syntaxes() -> Sequence[ToolSyntax]:
    """Return the syntaxes of calls that are installed, in the order in which they are tried."""
    syntaxes: Sequence[ToolSyntax] = (OBJECTS,) if missing_part() else load_module(PART, "syntaxes").TOOL_SYNTAXES
    return syntaxes


def answer_syntax(conversation: str) -> AnswerSyntax | None:
    """Return the syntax of the answers in a rendered conversation, unless they are content and calls.

    Raises MissingPartError.
    """
    if MESSAGES not in conversation:
        return None
    harmony: AnswerSyntax = load_module(PART, "syntaxes").HARMONY
    return harmony


def decode_format(encoded: msgspec.Raw) -> AnswerFormat | None:
    """Return the format of answers that msgspec has encoded as JSON."""
    formats: list[Any] = [None, AnswerFormat]
    if missing_part() is None:
        formats.append(load_module(PART, "syntaxes").HARMONY.format)
    kinds: Any = reduce(or_, (syntax.kind for syntax in tool_syntaxes()))
    found: AnswerFormat | None = msgspec.json.decode(
        encoded, type=reduce(or_, formats), dec_hook=lambda _, value: msgspec.convert(value, kinds)
    )
    return found


def name_format(format: ToolFormat) -> ToolFormat:
    """Return a format with its name, and with the fields that its family needs."""
    syntax = next(each for each in tool_syntaxes() if each.kind is type(format.arguments))
    texts = "\n".join(format.texts)
    for text, name, fields in syntax.families:
        if text in texts:
            return replace(format, name=name, **fields)
    is_bare = (format.start + format.before_name).lstrip()[:1] in ("{", "[") and syntax.is_bare
    return replace(format, name=syntax.name, is_bare=is_bare)


def announced_format(prompt: str) -> ToolFormat | None:
    """Return the format that a prompt with tools asks for."""
    announced = [each for syntax in tool_syntaxes() for each in syntax.announced]
    return next((format for text, format in announced if text in prompt), None)


def find_call(text: str, name: str) -> FoundCall | None:
    """Find the first call of a tool in a text, in the first syntax that fits."""
    begin = text.find(name)
    found = (syntax.find(text, begin, name) for syntax in tool_syntaxes()) if begin >= 0 else ()
    return next(filter(None, found), None)
