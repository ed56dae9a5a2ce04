"""The syntaxes that the part adds, and how they are found in what a chat template renders."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from server.parts.tool_formats.harmony import ANALYSIS_TAGS, HARMONY_FORMAT, HarmonyFormat, convert
from server.parts.tool_formats.literals import GEMMA, PYTHON, LiteralArguments
from server.parts.tool_formats.named import JSONArguments, MistralCall
from server.parts.tool_formats.tags import TaggedArguments
from server.text.parsers.tool_formats import ID, ObjectCall, ToolFormat
from server.text.templates.syntaxes import (
    ARGUMENTS,
    FIRST,
    KEYS,
    LAST,
    OBJECTS,
    TYPES,
    AnswerSyntax,
    FoundCall,
    ToolSyntax,
    decode_at,
    find_all,
    find_object,
)
from server.text.templates.tool_probe import common_prefix

_VALUES = {"string": re.escape(FIRST), "number": "7", "boolean": "[Tt]rue", "object": r"\{", "array": r"\[\s*81"}


class _Values(NamedTuple):
    """Arguments that are written one after the other: the texts around the first and after the last, and the keys."""

    before: str
    after_key: str
    between: str
    rest: str
    positions: Sequence[int]


def _find_values(text: str, after: int) -> _Values | None:
    positions = [text.find(key, after) for key in KEYS]
    first, last = text.find(FIRST, after), text.find(LAST, after)
    if -1 in (*positions, first, last) or positions != sorted(positions) or first < positions[0]:
        return None
    after_key, between = text[positions[0] + len(KEYS[0]) : first], text[first + len(FIRST) : positions[1]]
    return _Values(text[after : positions[0]], after_key, between, text[last + len(LAST) :], positions)


def find_literals(text: str, begin: int, name: str) -> FoundCall | None:
    """Find a call with arguments such as `(a='x', b=1)` or `{a:"x",b:1}`."""
    if (found := _find_values(text, begin + len(name))) is None:
        return None
    before, after_key, rest = found.before.strip(), found.after_key.strip(), found.rest
    opener, assign, quote = before[-1:], after_key[:1], after_key[1:].strip()
    closers = {"(": ")", "{": "}"}
    if opener not in closers or assign not in ("=", ":") or not quote or not rest.startswith(quote):
        return None
    python = quote in PYTHON.quotes
    syntax = msgspec.structs.replace(
        PYTHON if python else GEMMA,
        quotes=PYTHON.quotes if python else (quote,),
        after_key=assign,
        close=closers[opener],
        separator=found.between.removeprefix(quote),
        words=PYTHON.words if "True" in text[found.positions[3] : found.positions[4]] else GEMMA.words,
    )
    return FoundCall(text[:begin], found.before, rest.removeprefix(quote), syntax)


def find_tags(text: str, begin: int, name: str) -> FoundCall | None:
    """Find a call with arguments between tags, which tell no types, and values that are not tags in turn."""
    if (found := _find_values(text, begin + len(name))) is None:
        return None
    after_value = common_prefix(found.between, found.rest)
    before_key = found.between.removeprefix(after_value)
    if not after_value.strip() or not found.before.endswith(before_key) or not before_key or KEYS[0] in found.between:
        return None
    for position, key, kind in zip(found.positions, KEYS[:-1], TYPES, strict=False):
        if not re.match(re.escape(key + found.after_key) + _VALUES[kind], text[position:]):
            return None
    is_padded = found.after_key.endswith("\n") and after_value.startswith("\n")
    syntax = TaggedArguments(before_key, found.after_key, after_value, is_padded)
    rest = found.rest.removeprefix(after_value)
    return FoundCall(text[:begin], found.before.removesuffix(before_key), rest, syntax)


def find_json(text: str, begin: int, name: str) -> FoundCall | None:
    """Find a call that is the name and the arguments as a JSON object."""
    after = begin + len(name)
    for position in find_all(text, "{", after):
        value, end = decode_at(text, position)
        if value == ARGUMENTS:
            return FoundCall(text[:begin], text[after:position], text[end:], JSONArguments())
    return None


def find_mistral(text: str, begin: int, name: str) -> FoundCall | None:
    """Find a call that is an object after the marker of Mistral's models, which later ones put before a name."""
    found = find_object(text, begin, name)
    if found is None or "[TOOL_CALLS]" not in found.before or not isinstance(found.arguments, ObjectCall):
        return None
    return replace(found, arguments=MistralCall(found.arguments.name_key, found.arguments.arguments_key))


TOOL_SYNTAXES = (
    ToolSyntax(
        kind=MistralCall,
        name="mistral",
        families=(("[TOOL_CALLS]", "mistral", {"name_ends": ("[ARGS]", f"[CALL_ID]{ID}[ARGS]", "")}),),
        find=find_mistral,
    ),
    OBJECTS,
    ToolSyntax(
        kind=JSONArguments,
        name="named_json",
        families=(
            ("[TOOL_CALLS]", "mistral_names", {"name_ends": (f"[CALL_ID]{ID}[ARGS]", "")}),
            ("<｜tool▁call▁begin｜>", "deepseek", {}),
            ("<|tool_call_begin|>", "kimi_k2", {}),
            ("<|tools_prefix|>", "apertus", {}),
            ("<|tool_call:begin|>", "solar", {}),
        ),
        find=find_json,
    ),
    ToolSyntax(
        kind=LiteralArguments,
        name="literal",
        families=(
            ("<|tool_call>", "gemma4", {}),
            ("<|tool_call_start|>", "lfm2", {}),
            ("[", "pythonic", {"is_bare": True}),
        ),
        announced=(
            (
                "<|tool_list_start|>",
                ToolFormat(
                    "lfm2",
                    start="<|tool_call_start|>[",
                    before_name="",
                    after_name="(",
                    after_arguments=")",
                    separator=", ",
                    end="]<|tool_call_end|>",
                    arguments=PYTHON,
                ),
            ),
        ),
        find=find_literals,
    ),
    ToolSyntax(
        kind=TaggedArguments,
        name="tagged",
        families=(
            ("<function=", "qwen3_coder", {}),
            ("<arg_key>", "glm", {}),
            ("<minimax:tool_call>", "minimax_m2", {}),
            ("atem:", "muse", {}),
        ),
        is_bare=False,
        find=find_tags,
    ),
)
HARMONY = AnswerSyntax(
    tool_format=HARMONY_FORMAT, format=HarmonyFormat, tags=ANALYSIS_TAGS, message_field="thinking", convert=convert
)
