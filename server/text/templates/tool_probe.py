"""Find out how a chat template writes tool calls, by rendering conversations and looking at what known values are in.

So a template needs no entry in a table, if it writes calls in one of the syntaxes of
`server.text.parsers.tool_formats`. A table only has what no conversation shows: names, and other forms that the models
are known to write.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgspec

from server.text.parsers.tool_formats import (
    GEMMA,
    GENERIC,
    ID,
    INDEX,
    KEY,
    NAME,
    PYTHON,
    Arguments,
    JSONArguments,
    LiteralArguments,
    ObjectCall,
    TaggedArguments,
    ToolFormat,
)
from server.text.templates.families import announced_format, name_format
from server.text.templates.rendered_text import common_prefix, common_suffix

Message = dict[str, Any]
Render = Callable[..., str | None]  # (messages, *, tools, add_generation_prompt, **options); None: not possible

QUESTION, CONTENT, RESULT = "lwquestion", "lwcontent", "lwresult"
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
_PROPERTIES = {
    key: {"type": kind, "description": "x", "items": {"type": "integer"}, "additionalProperties": {"type": "string"}}
    for key, kind in zip(KEYS, TYPES, strict=True)
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "x",
            "parameters": {"type": "object", "properties": _PROPERTIES, "required": list(KEYS)},
        },
    }
    for name in NAMES
]


def user() -> Message:
    return {"role": "user", "content": QUESTION}


def assistant(content: str = "", num_calls: int = 0, ids: Sequence[str] = IDS, **fields: Any) -> Message:
    """Return an assistant's message with calls of the first tools."""
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        for id, name in list(zip(ids, NAMES, strict=True))[:num_calls]
    ]
    return {"role": "assistant", "content": content, **fields} | ({"tool_calls": calls} if calls else {})


def after_question(render: Render, *messages: Message, **options: Any) -> str | None:
    """Return what the template writes after the user's question, or None if it cannot render the messages."""
    text = render([user(), *messages], tools=TOOLS, **options)
    return None if text is None or QUESTION not in text else text.rpartition(QUESTION)[2]


@dataclass(frozen=True, slots=True)
class _Parts:
    """A call in a rendered text: the text up to the tool's name, up to the arguments, and after them."""

    before: str
    after_name: str
    after: str
    arguments: Arguments


def probe_tool_format(render: Render) -> ToolFormat | None:
    """Return the format of tool calls, None if the template does not mention tools.

    The format has `is_recognized` False if the template describes tools but no format of calls was found.
    """
    described = after_question(render) is not None and _describes_tools(render)
    text = after_question(render, assistant(num_calls=1))
    found = None if text is None else _find_call(_with_slots(text))
    if found is None:
        announced = announced_format(render([user()], tools=TOOLS) or "") if described else None
        return announced or (None if not described and not _writes_names(text) else _unrecognized())
    before = _text_before_call(render, found.before)
    after = _text_after_call(render, found.after)
    format = ToolFormat(
        "",
        before_name=before,
        after_name=found.after_name.replace(NAMES[0], NAME),
        after_arguments=after,
        arguments=found.arguments,
        several=False,
        id_length=_id_length(render),
    )
    return name_format(_with_several_calls(render, format))


def _describes_tools(render: Render) -> bool:
    return all(name in (render([user()], tools=TOOLS) or "") for name in NAMES)


def _writes_names(text: str | None) -> bool:
    return text is not None and NAMES[0] in text


def _unrecognized() -> ToolFormat:
    return replace(GENERIC, is_recognized=False)


def _with_slots(text: str) -> str:
    """Replace the ids of calls by slots."""
    for id in IDS:
        text = text.replace(id, ID)
    return text


def _find_call(text: str, name: str = NAMES[0]) -> _Parts | None:
    """Find the first call of a tool in a text."""
    begin = text.find(name)
    if begin < 0:
        return None
    after = begin + len(name)
    return _find_object(text, begin, name) or _find_json(text, begin, after) or _find_values(text, begin, after)


def _decode_at(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value at a position and its end; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except ValueError:
        return None, position


def _positions(text: str, char: str, begin: int = 0) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(char), text) if match.start() >= begin]


def _find_object(text: str, begin: int, name: str) -> _Parts | None:
    """Find a call that is a JSON object with the name and the arguments as members."""
    for position in reversed(_positions(text[:begin], "{")):
        value, end = _decode_at(text, position)
        if isinstance(value, dict) and name in value.values() and ARGUMENTS in value.values():
            name_key = next(key for key, item in value.items() if item == name)
            arguments_key = next(key for key, item in value.items() if item == ARGUMENTS)
            start = next(p for p in _positions(text, "{", begin) if _decode_at(text, p)[0] == ARGUMENTS)
            arguments_end = _decode_at(text, start)[1]
            after = re.sub(rf',\s*"\w+":\s*"{ID}"', "", text[arguments_end:end]) + text[end:]
            return _Parts(text[:begin], text[begin + len(name) : start], after, ObjectCall(name_key, arguments_key))
    return None


def _find_json(text: str, begin: int, after: int) -> _Parts | None:
    """Find a call that is the name and the arguments as a JSON object."""
    for position in _positions(text, "{", after):
        value, end = _decode_at(text, position)
        if value == ARGUMENTS:
            return _Parts(text[:begin], text[after:position], text[end:], JSONArguments())
    return None


def _find_values(text: str, begin: int, after: int) -> _Parts | None:
    """Find a call that writes the arguments one after the other, as literals or between tags."""
    positions = [text.find(key, after) for key in KEYS]
    first, last = text.find(FIRST, after), text.find(LAST, after)
    if -1 in (*positions, first, last) or positions != sorted(positions) or first < positions[0]:
        return None
    before_first, between = text[after : positions[0]], text[first + len(FIRST) : positions[1]]
    after_key = text[positions[0] + len(KEYS[0]) : first]
    rest = text[last + len(LAST) :]
    literal = _literal_syntax(
        before_first, after_key, between, rest, is_python="True" in text[positions[3] : positions[4]]
    )
    if literal is not None:
        quote = after_key.strip()[1:].strip()
        return _Parts(text[:begin], before_first, rest.removeprefix(quote), literal)
    between, rest_with_slot = between.replace(KEYS[0], KEY), rest.replace(KEYS[-1], KEY)
    after_value = common_prefix(between, rest_with_slot)
    before_key = between.removeprefix(after_value)
    if not after_value.strip() or not before_first.endswith(before_key) or not before_key:
        return None
    after_keys = _after_keys(text, positions)
    syntax = TaggedArguments(
        before_key,
        after_key,
        after_value,
        after_keys=after_keys if len(set(after_keys.values())) > 1 else {},
        is_padded=after_key.endswith("\n") and after_value.startswith("\n"),
        is_nested=after_keys.get("object") is None,
    )
    rest = rest.removeprefix(after_value.replace(KEY, KEYS[-1]))
    return _Parts(text[:begin], before_first.removesuffix(before_key), rest, syntax)


def _literal_syntax(
    before_first: str, after_key: str, between: str, rest: str, *, is_python: bool
) -> LiteralArguments | None:
    """Return the syntax of arguments such as `(a='x', b=1)` or `{a:"x",b:1}`, or None if they are no literals."""
    opener, assign, quote = before_first.strip()[-1:], after_key.strip()[:1], after_key.strip()[1:].strip()
    closers = {"(": ")", "{": "}"}
    if opener not in closers or assign not in ("=", ":") or not quote or not rest.startswith(quote):
        return None
    python = quote in PYTHON.quotes
    return msgspec.structs.replace(
        PYTHON if python else GEMMA,
        quotes=PYTHON.quotes if python else (quote,),
        after_key=assign,
        close=closers[opener],
        separator=between.removeprefix(quote),
        words=PYTHON.words if is_python else GEMMA.words,
    )


_VALUES = {"string": re.escape(FIRST), "number": "73", "boolean": "[Tt]rue", "object": r"\{", "array": r"\[\s*81"}


def _after_keys(text: str, positions: Sequence[int]) -> dict[str, str]:
    """Return the text between the name and the value of a parameter, by the JSON type of the value."""
    found = {}
    for (begin, end), key, kind in zip(pairwise([*positions, len(text)]), KEYS, TYPES, strict=True):
        match = re.search(_VALUES[kind], text[begin + len(key) : end])
        if match is not None and kind not in found:
            found[kind] = text[begin + len(key) :][: match.start()]
    return found


def _text_before_call(render: Render, before: str) -> str:
    """Return the text that the model writes before the name of the first tool, without the beginning of its turn.

    It is what follows the content of a message with calls, or the beginning of a turn; the shorter of the two.
    """
    with_content = after_question(render, assistant(CONTENT, num_calls=1)) or ""
    plain = after_question(render, assistant(CONTENT)) or ""
    headers = [after_question(render, add_generation_prompt=True) or "", plain.partition(CONTENT)[0]]
    cut = max((common_prefix(before, header) for header in headers), key=len)
    found = [before.removeprefix(cut).lstrip()]
    if 0 <= with_content.find(CONTENT) < with_content.find(NAMES[0]):
        text = _with_slots(with_content).partition(CONTENT)[2].partition(NAMES[0])[0]
        found.append(text.removeprefix(common_prefix(text, plain.partition(CONTENT)[2])).lstrip())
    return min(found, key=len)


def _text_after_call(render: Render, after: str) -> str:
    """Return the text that the model writes after the arguments of the last call, without the end of its turn."""
    plain = after_question(render, assistant(CONTENT))
    rest = "" if plain is None else plain.partition(CONTENT)[2]
    with_call = after_question(render, assistant(CONTENT, num_calls=1)) or ""
    rest = rest.removeprefix(common_prefix(rest, with_call.partition(CONTENT)[2]))
    if rest.strip():
        after = after.partition(rest.strip())[0]
    return after.removesuffix(common_suffix(after, rest)).rstrip()


def _with_several_calls(render: Render, format: ToolFormat) -> ToolFormat:
    """Return the format with the texts around calls told from those around all of them, if it has several calls."""
    text = after_question(render, assistant(num_calls=2))
    if text is None or text.find(NAMES[1]) <= text.find(NAMES[0]):
        return format
    text = _with_slots(text)
    first, second = _find_call(text), _find_call(text, NAMES[1])
    if first is None or second is None or not second.before.startswith(text[: len(text) - len(first.after)]):
        return format
    between = second.before[len(text) - len(first.after) :]
    if isinstance(format.arguments, ObjectCall):
        between = re.sub(rf',\s*"\w+":\s*"{ID}"(?=\s*\}})', "", between)
    before, between, after_name = _with_index(format, between, second.after_name.replace(NAMES[1], NAME))
    call_end = common_prefix(between, format.after_arguments)
    call_start = common_suffix(before, between.removeprefix(call_end))
    return replace(
        format,
        start=before.removesuffix(call_start),
        before_name=call_start,
        after_name=after_name,
        after_arguments=call_end,
        separator=between.removeprefix(call_end).removesuffix(call_start),
        end=format.after_arguments.removeprefix(call_end),
        several=True,
    )


def _with_index(format: ToolFormat, between: str, after_name: str) -> tuple[str, str, str]:
    """Replace the number of the call by a slot, where the texts around two calls differ only in it."""

    def merge(first: str, second: str) -> tuple[str, str]:
        for number in (0, 1):
            pattern = (rf"(?<!\w){number}(?!\w)", rf"(?<!\w){number + 1}(?!\w)")
            slots = re.sub(pattern[0], INDEX, first), re.sub(pattern[1], INDEX, second)
            if (
                slots[0] != first
                and slots[1] != second
                and len(common_suffix(*slots)) > len(common_suffix(first, second))
            ):
                return slots
        return first, second

    before, merged = merge(format.before_name, between)
    one, other = merge(format.after_name, after_name)
    return before, merged, one if one == other else format.after_name


def _id_length(render: Render) -> int | None:
    """Return the length of a call's id if the template refuses others."""
    other = render([user(), assistant(num_calls=1, ids=("lwid0001x0", "lwid0001x1"))], tools=TOOLS)
    return None if other is not None else len(IDS[0])
