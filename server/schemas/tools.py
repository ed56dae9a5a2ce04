"""The tools of a chat request, the choice among them, and the tool calls of earlier answers."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag

from server.http.errors import InvalidValueError, invalid
from server.http.strict_json import describe_size
from server.schemas.request_fields import OpenObject, optional

MAX_TOOLS = 128
TOOL_NAME = "^[a-zA-Z0-9_-]{1,128}$"
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}

ToolName = Annotated[str, Field(pattern=TOOL_NAME)]


def _check_parameters(value: dict[str, Any]) -> dict[str, Any]:
    if (kind := value.get("type", "object")) != "object":
        raise ValueError(f"expected a JSON schema with 'type': 'object', but its type is {str(kind)[:64]!r}.")
    return value


class FunctionDefinition(OpenObject):
    """The function of a tool."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = optional(
        "A JSON schema of type object. Default: no parameters."
    )
    strict: bool | None = optional("The arguments follow the schema exactly.")


class Tool(OpenObject):
    type: Literal["function"]
    function: FunctionDefinition

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        return self.function.parameters or NO_PARAMETERS

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": function | {"parameters": self.parameters}}


class FunctionName(OpenObject):
    name: str


class NamedTool(OpenObject):
    """A tool choice that names the one tool to call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(OpenObject):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(OpenObject):
    """A tool choice that allows some of the tools, which may or must be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_tag(value: object) -> str:
    """Return the tag of the union member to validate a value against, so that there is a single error."""
    if not isinstance(value, dict | BaseModel):
        return "word"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "choice-of-some" if kind == "allowed_tools" else "choice-of-one"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("choice-of-one")]
    | Annotated[AllowedToolsChoice, Tag("choice-of-some")],
    Discriminator(_choice_tag),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def check_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> None:
    """Raise InvalidValueError for names that are not unique, and for a choice that does not fit the tools."""
    names = [tool.name for tool in tools or ()]
    if len(set(names)) < len(names):
        name = next(name for index, name in enumerate(names) if name in names[:index])
        raise invalid("tools", f"the name '{name}' is not unique")
    if not tools and choice not in (None, "none", "auto"):
        raise invalid("tool_choice", "only allowed when 'tools' are given")
    for name in chosen_names(choice):
        if name not in names:
            raise invalid("tool_choice", f"no tool of 'tools' has the name '{name[:64]}'")


def chosen_names(choice: ToolChoice | None) -> list[str]:
    """Return the names of the tools in a tool choice."""
    match choice:
        case NamedTool():
            return [choice.function.name]
        case AllowedToolsChoice():
            return [tool.function.name for tool in choice.allowed_tools.tools]
    return []


def must_call(choice: ToolChoice | None) -> bool:
    """Return whether the answer must contain a tool call."""
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedTool)


def offered_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """Return the tools to describe to the model."""
    if choice == "none":
        return []
    allowed = chosen_names(choice) if isinstance(choice, AllowedToolsChoice) else None
    return [tool for tool in tools or () if allowed is None or tool.name in allowed]


def callable_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """Return the tools that the model may call."""
    named = choice.function.name if isinstance(choice, NamedTool) else None
    return [tool for tool in offered_tools(tools, choice) if named in (None, tool.name)]


def followed_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """Return the tools whose calls must follow their schemas: those that may be called, if one must be or if strict."""
    is_forced = must_call(choice)
    return [tool for tool in callable_tools(tools, choice) if is_forced or tool.function.strict]


class FunctionCall(OpenObject):
    """The function of a tool call."""

    name: str
    arguments: str = Field(description="A JSON object as text.")


class ToolCall(OpenObject):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates expect it, with the arguments as an object if they are valid JSON."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            decoded = msgspec.json.decode(arguments or "{}")
            arguments = decoded if isinstance(decoded, dict) else arguments
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id} | call


def check_arguments(calls: Iterable[ToolCall]) -> None:
    """Raise InvalidValueError if the JSON in the arguments of all calls exceeds the limits of a request's body."""
    if (problem := describe_size([call.function.arguments.encode() for call in calls])) is not None:
        message = f"Invalid 'messages[].tool_calls[].function.arguments': together they have {problem}."
        raise InvalidValueError(message, param="messages")
