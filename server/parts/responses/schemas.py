"""`POST /v1/responses` of OpenAI's Responses API: the request and the answer.

https://platform.openai.com/docs/api-reference/responses. The events of its stream are in `event_schemas`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, FiniteFloat, Tag

from server.api.chat.schemas import MAX_MESSAGES, MAX_PARTS, TemplateOptions
from server.api.chat.writer import TokenLogprob
from server.parts.conversions.chat_requests import IgnoredObject
from server.parts.responses.custom_tools import as_function_item
from server.schemas.answers import RequestTimings
from server.schemas.request_fields import MAX_STOPS, MaxTokens, OpenObject, Stop, at_most, optional
from server.schemas.sampling import parameter
from server.schemas.tools import MAX_TOOLS, ToolName

MAX_METADATA = 16  # entries
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters

# Requests.


class InputText(OpenObject):
    type: Literal["input_text"]
    text: str


class PastText(OpenObject):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class PastRefusal(OpenObject):
    """Refusal of an earlier answer, from another model. It is treated as text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


InputTextPart = Annotated[InputText | PastText | PastRefusal, Field(discriminator="type")]
InputTextParts = Annotated[list[InputTextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class RequestItem(OpenObject):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputMessage(RequestItem):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | InputTextParts
    phase: str | None = None


class PastCall(RequestItem):
    """A tool call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str


class CallOutput(RequestItem):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: str | InputTextParts


class PastReasoningText(OpenObject):
    type: Literal["reasoning_text"]
    text: str


class PastReasoning(RequestItem):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    content: Annotated[list[PastReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None


class ItemReference(OpenObject):
    """A reference to an item of a stored response."""

    type: Literal["item_reference"]
    id: str = Field(min_length=1)


class IgnoredItem(IgnoredObject):
    """An item of a tool or service that this server does not have. The model does not see it."""

    type: (
        Literal[
            "file_search_call", "web_search_call", "code_interpreter_call", "image_generation_call", "computer_call"
        ]
        | Literal["computer_call_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call"]
        | Literal["tool_search_call", "tool_search_output", "additional_tools", "program", "program_output"]
        | Literal["configuration_update"]
    )


FullInputItem = InputMessage | PastCall | CallOutput | PastReasoning
InputItem = Annotated[
    Annotated[FullInputItem | ItemReference | IgnoredItem, Field(discriminator="type")],
    BeforeValidator(as_function_item),
]


class FunctionTool(OpenObject):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomTool(OpenObject):
    """A tool whose input is text. The model sees a function with the parameter `input`."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: dict[str, Any] | None = optional("A grammar of the input is ignored, and reported as such.")


class UnsupportedTool(IgnoredObject):
    """A built-in tool, which this server cannot run, or one of an unknown type. It is ignored."""


def _kind_of_tool(value: object) -> str:
    kind = value.get("type", "function") if isinstance(value, dict) else getattr(value, "type", "function")
    return f"{kind}-tool" if kind in ("function", "custom") else "other-tool"


ResponsesTool = Annotated[
    Annotated[FunctionTool, Tag("function-tool")]
    | Annotated[CustomTool, Tag("custom-tool")]
    | Annotated[UnsupportedTool, Tag("other-tool")],
    Discriminator(_kind_of_tool),
]


class ResponsesNamedTool(OpenObject):
    type: Literal["function", "custom"]
    name: str


NamedOrIgnoredTool = Annotated[
    Annotated[ResponsesNamedTool, Tag("function-tool")]
    | Annotated[ResponsesNamedTool, Tag("custom-tool")]
    | Annotated[UnsupportedTool, Tag("other-tool")],
    Discriminator(_kind_of_tool),
]


class ResponsesAllowedTools(OpenObject):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedOrIgnoredTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def _kind_of_choice(value: object) -> str:
    if not isinstance(value, dict | BaseModel):
        return "choice-word"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "choice-of-some" if kind == "allowed_tools" else "choice-of-one"


ResponsesToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("choice-word")]
    | Annotated[NamedOrIgnoredTool, Tag("choice-of-one")]
    | Annotated[ResponsesAllowedTools, Tag("choice-of-some")],
    Discriminator(_kind_of_choice),
]


class PlainFormat(OpenObject):
    type: Literal["text", "json_object"]


class SchemaFormat(OpenObject):
    type: Literal["json_schema"]
    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(OpenObject):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = optional(
        "Ignored. Values other than medium are reported as ignored."
    )


class ReasoningConfig(OpenObject):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = optional(
        "Passed to the chat template. Ignored, and reported, if the template does not read it."
    )
    summary: Literal["auto", "concise", "detailed"] | None = optional(
        "Accepted and ignored: reasoning is returned in full."
    )


Included = Literal[
    "message.output_text.logprobs",
    # Accepted and ignored: built-in tools are not supported, and reasoning is not encrypted.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseStreamOptions(OpenObject):
    include_obfuscation: bool | None = optional("Accepted and ignored: events are never padded.")


def _check_metadata(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if len(name) > MAX_METADATA_KEY:
            raise ValueError(f"expected keys of at most {MAX_METADATA_KEY} characters, but got one of {len(name)}.")
        if len(text) > MAX_METADATA_VALUE:
            limit = f"at most {MAX_METADATA_VALUE} characters"
            raise ValueError(f"expected values of {limit}, but that of '{name}' has {len(text)}.")
    return value


Metadata = Annotated[
    dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA), AfterValidator(_check_metadata)
]


class ResponsesRequest(OpenObject):
    model: str = Field(description="Name of the model, as listed by GET /v1/models.")
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = (
        Field(None, description="The input of this turn. Required unless previous_response_id is set.")
    )
    instructions: str | None = optional("System message for this request, placed first.")
    previous_response_id: str | None = optional("Id of a stored response whose conversation to continue.")
    max_output_tokens: MaxTokens | None = optional(
        "Maximum number of output tokens; -1: no limit. Default: the rest of the context."
    )
    temperature: FiniteFloat | None = parameter("temperature")
    top_p: FiniteFloat | None = parameter("top_p")
    include: Annotated[list[Included], Field(max_length=MAX_PARTS, fail_fast=True)] | None = optional(
        "message.output_text.logprobs: return the log probability of each output token. Other values "
        "are accepted and ignored."
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Number of most likely tokens to return for each position. Requires message.output_text.logprobs "
        "in include.",
    )
    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} strings that end the text. They are not returned.")
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = optional(
        "Functions and custom tools that the model may call. Others are ignored, and reported as such."
    )
    tool_choice: ResponsesToolChoice | None = optional(
        "Whether the model calls a tool, and which one. A choice of ignored tools is ignored. Default auto."
    )
    parallel_tool_calls: bool | None = optional("Allow several tool calls in one answer. Default true.")
    max_tool_calls: int | None = Field(
        None, ge=1, description="Accepted and ignored: it limits built-in tools, which are not supported."
    )
    text: TextConfig | None = optional(
        "Format of the answer: text, any JSON object, or JSON that matches a schema. Default text."
    )
    reasoning: ReasoningConfig | None = optional("effort is passed to the chat template; summary is ignored.")
    chat_template_kwargs: TemplateOptions | None = optional(
        "Variables for the model's chat template, such as enable_thinking."
    )
    truncation: Literal["disabled", "auto"] | None = optional(
        "auto: drop the oldest turns, but no instructions, if the conversation exceeds the context. "
        "Default disabled: return an error."
    )
    metadata: Metadata | None = optional("Returned in the response.")
    user: str | None = optional("Returned in the response.")
    safety_identifier: str | None = optional("Returned in the response.")
    prompt_cache_key: str | None = optional("Returned in the response. Prefix caching does not need it.")
    service_tier: str | None = optional("Accepted and ignored: the only tier is default.")
    store: bool | None = optional("Store the response for later retrieval. Default true.")
    background: bool | None = optional(
        "Return at once and generate in the background. With stream, the events are stored."
    )
    stream: bool | None = optional("Stream the answer as server-sent events.")
    stream_options: ResponseStreamOptions | None = optional("Accepted and ignored: events are never padded.")


class InputTokensRequest(ResponsesRequest):
    """A request whose prompt tokens are counted. Fields that do not affect the prompt are validated too."""

    model: str | None = optional("Name of the model, as in GET /v1/models. Default: the only one.")  # type: ignore[assignment]


# Answers.

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    text: str = ""


class GrowingItem(msgspec.Struct, kw_only=True, tag_field="type"):
    """An output item."""

    id: str
    status: ItemStatus = "in_progress"


class MessageItem(GrowingItem, kw_only=True, tag="message"):
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(GrowingItem, kw_only=True, tag="reasoning"):
    summary: list[Any] = []
    content: list[ReasoningText]


class FunctionCallItem(GrowingItem, kw_only=True, tag="function_call"):
    call_id: str
    name: str
    arguments: str


class CustomCallItem(GrowingItem, kw_only=True, tag="custom_tool_call"):
    call_id: str
    name: str
    input: str = ""


OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    message: str
    code: Literal["server_error", "rate_limit_exceeded"]


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response with the parameters of its request, defaults filled in."""

    id: str
    object: Literal["response"] = "response"
    created_at: int  # seconds since the epoch
    status: Literal["in_progress", "completed", "incomplete", "cancelled", "failed"] = "in_progress"
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled", "auto"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]
    service_tier: Literal["default"] = "default"
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    lightwell: RequestTimings | UnsetType = UNSET


class DeletedResponse(msgspec.Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(msgspec.Struct, frozen=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a response's input items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
