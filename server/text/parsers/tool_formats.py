"""The formats in which models write tool calls, and their detection from the chat template."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A format of tool calls: JSON objects with the tool's `name` and its `arguments` (or `parameters`)."""

    name: str
    start: str  # marker before a call or several calls
    end: str = ""  # marker after the last call; empty: none
    is_bare: bool = False  # calls may also appear without `start`, if the answer has no other content
    has_arrays: bool = False  # several calls may be in a JSON array
    has_names: bool = False  # a call may also be the tool's name followed by its arguments
    separator: str = ""  # allowed between two calls
    arguments_key: str = "arguments"
    name_end: str = ""  # marker after the name, if `has_names`
    other_markers: tuple[str, ...] = ()  # further markers to remove from content
    id_length: int | None = None  # characters of a call's id, if the template requires a fixed length

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.start, self.end, self.name_end, *self.other_markers)))


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = ToolFormat("llama3", "<|python_tag|>", is_bare=True, separator=";", arguments_key="parameters")
MISTRAL = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    has_arrays=True,
    has_names=True,
    name_end="[ARGS]",
    other_markers=("[CALL_ID]",),
    id_length=9,
)
MISTRAL_NAMES = replace(MISTRAL, name="mistral_names", has_arrays=False)
GENERIC = ToolFormat("generic", "<tool_call>", "</tool_call>", is_bare=True, has_arrays=True)

# Text in a chat template -> format of its tool calls. The first match counts.
_SIGNS = (
    ("[ARGS]", MISTRAL_NAMES),
    ("[TOOL_CALLS]", MISTRAL),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA3),
    ('"parameters": dictionary of argument name', LLAMA3),
)


def detect_tool_format(template_source: str) -> ToolFormat:
    """Return the format in which a chat template writes tool calls, or `GENERIC` if it writes none."""
    return next((format for sign, format in _SIGNS if sign in template_source), GENERIC)
