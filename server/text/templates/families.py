"""Names of the formats of tool calls, and forms of calls that no rendered conversation shows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.text.parsers.tool_formats import (
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMES,
    PYTHONIC,
    JSONArguments,
    LiteralArguments,
    ObjectCall,
    TaggedArguments,
    ToolFormat,
)

# Kind of arguments -> (text of the format, its name, fields that the models' other forms need). The first match counts.
FAMILIES: Mapping[type, tuple[tuple[str, str, Mapping[str, Any]], ...]] = {
    ObjectCall: (
        ("[TOOL_CALLS]", "mistral", {"name_ends": MISTRAL.name_ends}),
        ("<tool_call>", "hermes", {}),
        ("<tool_calls>", "tool_calls", {}),
        ("<TOOLCALL>", "nemotron", {}),
        ("<|START_ACTION|>", "cohere", {}),
        ("Action:", "command_r", {}),
        ("functools", "firefunction", {}),
        ("<|tool_call|>", "granite", {}),
        ("function call", "gigachat", {}),
        ("<|function_call|>", "gigachat", {}),
        ('"parameters"', "llama3", {"triggers": LLAMA3.triggers, "separator": "; ", "is_bare": True, "several": True}),
    ),
    JSONArguments: (
        ("[TOOL_CALLS]", "mistral_names", {"name_ends": MISTRAL_NAMES.name_ends}),
        ("<｜tool▁call▁begin｜>", "deepseek", {}),
        ("<|tool_call_begin|>", "kimi_k2", {}),
        ("<|tools_prefix|>", "apertus", {}),
        ("<|tool_call:begin|>", "solar", {}),
    ),
    TaggedArguments: (
        ("<function=", "qwen3_coder", {}),
        ("<arg_key>", "glm", {}),
        ("<minimax:tool_call>", "minimax_m2", {}),
        ("]<]minimax[>[", "minimax_m3", {}),
        ("｜DSML｜", "deepseek_dsml", {}),
        ("<|open|>", "kimi_k3", {}),
        ("atem:", "muse", {}),
    ),
    LiteralArguments: (
        ("<|tool_call>", "gemma4", {}),
        ("<|tool_call_start|>", "lfm2", {}),
        ("[", "pythonic", {"is_bare": True}),
    ),
}
GENERAL_NAMES = {
    ObjectCall: "json",
    JSONArguments: "named_json",
    TaggedArguments: "tagged",
    LiteralArguments: "literal",
}

# Text of a prompt with tools -> format, for templates that do not write the calls of earlier messages.
ANNOUNCED: tuple[tuple[str, ToolFormat], ...] = (
    ("<|tool_call|>", ToolFormat("granite", start="<|tool_call|>[", separator=", ", end="]")),
    ("<|tool|>", ToolFormat("phi4", start="<|tool_call|>[", separator=", ", end="]<|/tool_call|>")),
    (
        "<|tool_list_start|>",
        replace(PYTHONIC, name="lfm2", start="<|tool_call_start|>[", end="]<|tool_call_end|>", is_bare=False),
    ),
    ("functools[", ToolFormat("firefunction", start="functools[", separator=", ", end="]")),
)


def name_format(format: ToolFormat) -> ToolFormat:
    """Return a format with its name, and with the fields that its family needs."""
    kind = type(format.arguments)
    texts = "\n".join(format.texts)
    for text, name, fields in FAMILIES[kind]:
        if text in texts:
            return replace(format, name=name, **fields)
    is_bare = (format.start + format.before_name).lstrip()[:1] in ("{", "[") and kind is not TaggedArguments
    return replace(format, name=GENERAL_NAMES[kind], is_bare=is_bare)


def announced_format(prompt: str) -> ToolFormat | None:
    """Return the format that a prompt with tools asks for."""
    return next((format for text, format in ANNOUNCED if text in prompt), None)
