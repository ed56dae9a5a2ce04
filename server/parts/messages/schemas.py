"""`POST /v1/messages` of Anthropic's API: the request, the answer, and the events of its stream.

https://docs.claude.com/en/api/messages and .../messages-streaming. Fields that do not affect the text (cache_control,
citations, metadata) are accepted and ignored: prefixes are always cached.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, Tag

from server.api.chat.schemas import MAX_MESSAGES, MAX_PARTS
from server.schemas.answers import RequestTimings
from server.schemas.request_fields import MAX_STOPS, MaxTokens, StopStrings
from server.schemas.samplers import parameter
from server.schemas.tools import MAX_TOOLS, ToolName
from server.settings.sampling_parameters import INT64_MAX

# Requests.


class MessagesObject(BaseModel):
    """Base of the objects inside a request. Undeclared fields are kept, and reported by name."""

    model_config = ConfigDict(strict=True, extra="allow")

    cache_control: dict[str, Any] | None = None


class TextBlock(MessagesObject):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class PlainText(MessagesObject):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class TextContent(MessagesObject):
    type: Literal["content"]
    content: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class DocumentBlock(MessagesObject):
    """A text document. The prompt contains its title, context and text."""

    type: Literal["document"]
    source: Annotated[PlainText | TextContent, Field(discriminator="type")]
    title: str | None = None
    context: str | None = Field(None, description="Further information about the document for the model.")
    citations: dict[str, Any] | None = Field(None, description="Accepted and ignored: answers have no citations.")


class SearchResultBlock(MessagesObject):
    """A search result of the client. The prompt contains its title, source and text."""

    type: Literal["search_result"]
    title: str
    source: str
    content: Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]
    citations: dict[str, Any] | None = Field(None, description="Accepted and ignored: answers have no citations.")


class CompactionBlock(MessagesObject):
    """A summary of earlier turns."""

    type: Literal["compaction"]
    content: str | None = None
    encrypted_content: str | None = None
    signature: str | None = None


class IgnoredBlock(BaseModel):
    """A block of a tool or service that this server does not have. The model does not see it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: (
        Literal["server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"]
        | Literal[
            "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result"
        ]
        | Literal["tool_reference", "advisor_tool_result", "browser_state", "container_upload", "mcp_tool_use"]
        | Literal["mcp_tool_result", "mcp_tool_listing", "tool_addition", "tool_removal", "fallback"]
    )


ReadableBlock = Annotated[TextBlock | DocumentBlock | SearchResultBlock | IgnoredBlock, Field(discriminator="type")]


class ToolUseBlock(MessagesObject):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResultBlock(MessagesObject):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1)
    content: str | Annotated[list[ReadableBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    is_error: bool | None = Field(
        None, description="Whether the call failed. The content is then prefixed with 'Error: '."
    )


class ThinkingBlock(MessagesObject):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(MessagesObject):
    type: Literal["redacted_thinking"]
    data: str


UserBlock = Annotated[
    TextBlock | DocumentBlock | SearchResultBlock | ToolResultBlock | IgnoredBlock, Field(discriminator="type")
]
AssistantBlock = Annotated[
    TextBlock | CompactionBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock | IgnoredBlock,
    Field(discriminator="type"),
]


class UserMessage(MessagesObject):
    role: Literal["user", "ctx", "msg"] = Field(description="ctx and msg, which some clients send, mean user.")
    content: str | Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class AssistantMessage(MessagesObject):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class SystemMessage(MessagesObject):
    """An instruction that applies from its position in the conversation on."""

    role: Literal["system"]
    content: str | Annotated[list[TextBlock], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    clear_at: Literal["next_user_message", "never"] | None = Field(
        None, description="next_user_message: the instruction is dropped once a user message follows."
    )


MessageParam = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class ToolDefinition(MessagesObject):
    """A function that the client runs."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the tool's input.")
    strict: bool | None = None


class VendorTool(BaseModel):
    """A tool of Anthropic's, without a schema. Those in CLIENT_TOOLS get theirs, others are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    name: ToolName | None = None
    strict: bool | None = None


def _kind_of_tool(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "function-tool" if kind in (None, "custom") else "vendor-tool"


MessagesTool = Annotated[
    Annotated[ToolDefinition, Tag("function-tool")] | Annotated[VendorTool, Tag("vendor-tool")],
    Discriminator(_kind_of_tool),
]


class MessagesToolChoice(MessagesObject):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With type tool: name of the tool.")
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(MessagesObject):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"] = Field(
        description="adaptive, between_tools: the model decides."
    )
    budget_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of reasoning tokens; ignored if the model's reasoning tags are not single tokens. "
        "Required with type enabled, and must be less than max_tokens.",
    )
    display: Literal["summarized", "omitted", "updates"] | None = Field(
        None, description="omitted: the answer has no thinking blocks. Thinking is never summarized."
    )


class OutputSchemaFormat(MessagesObject):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(MessagesObject):
    format: OutputSchemaFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Passed to the chat template; ignored if the template does not read it."
    )


class CountTokensRequest(BaseModel):
    """The fields of a request that determine its prompt."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="Name of the model, as listed by GET /v1/models.")
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="The conversation so far. If the last message is an assistant's, the answer continues it."
    )
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = Field(
        None, description="System prompt, as text or text blocks."
    )
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None,
        description="Functions that the model may call, and Anthropic's tools bash, text_editor and memory. Others are "
        "ignored, and reported as such.",
    )
    tool_choice: MessagesToolChoice | None = Field(
        None,
        description="Whether the model calls a tool, and which one. A choice of ignored tools is ignored. "
        "Default auto.",
    )
    thinking: ThinkingConfig | None = Field(
        None,
        description="Whether the model reasons before it answers, and at most how long. Default: the model decides.",
    )
    output_config: OutputConfig | None = Field(
        None, description="Format of the answer (a JSON schema), and reasoning effort."
    )
    output_format: OutputSchemaFormat | None = Field(None, description="Deprecated alias of output_config.format.")


class MessagesRequest(CountTokensRequest):
    max_tokens: MaxTokens = Field(description="Maximum number of output tokens; -1: no limit.")
    temperature: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1,
        description="Sampling temperature. Values below 0.00001 select the most likely token. Default: "
        "--default-sampling, the model's recommendation, or 1.",
    )
    top_p: FiniteFloat | None = parameter("top_p")
    top_k: int | None = Field(None, ge=0, le=INT64_MAX, description="Keep this many of the most likely tokens; 0: all.")
    stop_sequences: StopStrings | None = Field(None, description=f"Up to {MAX_STOPS} strings that end the text.")
    stream: bool | None = Field(None, description="Stream the answer as server-sent events.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    service_tier: str | None = Field(None, description="Accepted and ignored.")


# Answers.


class CountTokensResponse(msgspec.Struct, frozen=True):
    input_tokens: int


class OutputTextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str
    citations: None = None


class OutputToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class OutputThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


OutputBlock = OutputTextBlock | OutputToolUseBlock | OutputThinkingBlock


class MessageUsage(msgspec.Struct, kw_only=True):
    """Token counts. The number of prompt tokens is the sum of the three input counts."""

    input_tokens: int  # prompt tokens not found in the prefix cache
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    lightwell: RequestTimings | UnsetType = UNSET


# The events of a stream.


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    message: AnthropicMessage


class ContentBlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: OutputBlock


class TextBlockDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class ToolInputDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class ThinkingBlockDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class ContentBlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextBlockDelta | ToolInputDelta | ThinkingBlockDelta


class ContentBlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    index: int


class StopDetails(msgspec.Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    delta: StopDetails
    usage: MessageUsage
    lightwell: RequestTimings | UnsetType = UNSET


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    pass
