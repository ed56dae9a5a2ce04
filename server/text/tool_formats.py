"""In which form models write the calls of tools. The chat template, which writes earlier calls, shows it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls are JSON objects with the tool's `name` and its `arguments` (or `parameters`)."""

    name: str
    start: str  # comes before a call, or before several
    end: str = ""  # comes after it; empty: nothing does
    is_bare: bool = False  # an answer may also be calls and nothing else, without `start`
    has_arrays: bool = False  # calls may stand in an array
    has_names: bool = False  # a call may also be the tool's name, followed by the arguments alone
    separator: str = ""  # may stand between two calls
    arguments_key: str = "arguments"
    name_end: str = ""  # what ends that name
    other_markers: tuple[str, ...] = ()  # that are no content either
    id_length: int | None = None  # characters of a call's id, where the template insists on it

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

# What a chat template has to hold -> the format; the first that fits counts.
_SIGNS = (
    ("[ARGS]", MISTRAL_NAMES),
    ("[TOOL_CALLS]", MISTRAL),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA3),
    ('"parameters": dictionary of argument name', LLAMA3),
)


def detect_tool_format(template_source: str) -> ToolFormat:
    """The format that a chat template writes calls in; `GENERIC` where it does not say."""
    return next((format for sign, format in _SIGNS if sign in template_source), GENERIC)
