"""Find out how a chat template writes tool calls, by rendering conversations and looking at what known values are in.

So a template needs no entry in a table, if it writes calls in one of the syntaxes of
`server.text.templates.syntaxes`. A table only has what no conversation shows: names, and other forms that the models
are known to write.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from server.text.parsers.tool_formats import GENERIC, ID, INDEX, NAME, ObjectCall, ToolFormat
from server.text.templates.syntaxes import (
    ARGUMENTS,
    CONTENT,
    IDS,
    KEYS,
    NAMES,
    QUESTION,
    TYPES,
    announced_format,
    find_call,
    name_format,
)

Message = dict[str, Any]
Render = Callable[..., str | None]  # (messages, *, tools, add_generation_prompt, **options); None: not possible

OPENERS = "<[{(\"'◁"
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


def probe_tool_format(render: Render) -> ToolFormat | None:
    """Return the format of tool calls, None if the template does not mention tools.

    The format has `is_recognized` False if the template describes tools but no format of calls was found.
    """
    question = render([user()], tools=TOOLS) or ""
    described = QUESTION in question and all(name in question for name in NAMES)
    text = after_question(render, assistant(num_calls=1))
    found = None if text is None else find_call(_with_slots(text), NAMES[0])
    if found is None:
        announced = announced_format(question) if described else None
        has_tools = described or (text is not None and NAMES[0] in text)
        return announced or (replace(GENERIC, is_recognized=False) if has_tools else None)
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


def _with_slots(text: str) -> str:
    """Replace the ids of calls by slots."""
    for id in IDS:
        text = text.replace(id, ID)
    return text


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
    first, second = find_call(text, NAMES[0]), find_call(text, NAMES[1])
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


# Rendered texts are compared at the boundaries of their tags.


def common_prefix(first: str, second: str) -> str:
    """Return the longest common prefix that ends between tags in both texts."""
    length = num_common(first, second)
    while length and not (_is_end(first, length) and _is_end(second, length)):
        length -= 1
    return first[:length]


def common_suffix(first: str, second: str) -> str:
    """Return the longest common suffix that begins with a tag or white space, or is a whole text."""
    length = num_common(first[::-1], second[::-1])
    while length and not (_is_begin(first, length) and _is_begin(second, length)):
        length -= 1
    return first[len(first) - length :]


def num_common(first: str, second: str) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _is_end(text: str, position: int) -> bool:
    """Return whether a text can be cut at a position without cutting a tag or a word."""
    if position == len(text):
        return True
    before, char = text[:position], text[position]
    if before.rfind("<") > before.rfind(">"):  # within a tag
        return False
    return char in "<[,◁" or char.isspace() or before[-1] in "\n})" or (before[-1] in ">]" and not char.isalnum())


def _is_begin(text: str, length: int) -> bool:
    """Return whether the last `length` characters of a text begin with a tag or white space."""
    begin = len(text) - length
    return begin == 0 or text[begin] in OPENERS or text[begin].isspace()


def last_tag(text: str) -> str:
    """Return the last tag at the end of a text, with the rest of its line: `<|channel>thought`."""
    text = text.rstrip()
    begin = max(text.rfind(opener) for opener in "<[◁")
    return text[begin:] if begin >= 0 else ""
