"""`POST /v1/messages` of Anthropic's API: the request.

https://docs.claude.com/en/api/messages and .../messages-streaming. Fields that do not affect the text (cache_control,
citations, metadata) are accepted and ignored: prefixes are always cached.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, FiniteFloat, Tag

from server.api.chat.schemas import MAX_MESSAGES, MAX_PARTS
from server.parts.conversions.chat_requests import IgnoredObject
from server.schemas.request_fields import MAX_STOPS, MaxTokens, OpenObject, StopStrings, optional
from server.schemas.sampling import parameter
from server.schemas.tools import MAX_TOOLS, ToolName
from server.settings.sampling import INT64_MAX


class MessagesObject(OpenObject):
    """Base of the objects inside a request. Undeclared fields are kept, and reported by name."""

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
    context: str | None = optional("Further information about the document for the model.")
    citations: dict[str, Any] | None = optional("Accepted and ignored: answers have no citations.")


class SearchResultBlock(MessagesObject):
    """A search result of the client. The prompt contains its title, source and text."""

    type: Literal["search_result"]
    title: str
    source: str
    content: Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]
    citations: dict[str, Any] | None = optional("Accepted and ignored: answers have no citations.")


class CompactionBlock(MessagesObject):
    """A summary of earlier turns."""

    type: Literal["compaction"]
    content: str | None = None
    encrypted_content: str | None = None
    signature: str | None = None


class IgnoredBlock(IgnoredObject):
    """A block of a tool or service that this server does not have. The model does not see it."""

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
    is_error: bool | None = optional("Whether the call failed. The content is then prefixed with 'Error: '.")


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
    clear_at: Literal["next_user_message", "never"] | None = optional(
        "next_user_message: the instruction is dropped once a user message follows."
    )


MessageParam = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class ToolDefinition(MessagesObject):
    """A function that the client runs."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the tool's input.")
    strict: bool | None = None


class VendorTool(IgnoredObject):
    """A tool of Anthropic's, without a schema. Those in CLIENT_TOOLS get theirs, others are ignored."""

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
    name: str | None = optional("With type tool: name of the tool.")
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
    display: Literal["summarized", "omitted", "updates"] | None = optional(
        "omitted: the answer has no thinking blocks. Thinking is never summarized."
    )


class OutputSchemaFormat(MessagesObject):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(MessagesObject):
    format: OutputSchemaFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = optional(
        "Passed to the chat template; ignored if the template does not read it."
    )


class CountTokensRequest(OpenObject):
    """The fields of a request that determine its prompt."""

    model: str = Field(description="Name of the model, as listed by GET /v1/models.")
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="The conversation so far. If the last message is an assistant's, the answer continues it."
    )
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = optional(
        "System prompt, as text or text blocks."
    )
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = optional(
        "Functions that the model may call, and Anthropic's tools bash, text_editor and memory. Others are "
        "ignored, and reported as such."
    )
    tool_choice: MessagesToolChoice | None = optional(
        "Whether the model calls a tool, and which one. A choice of ignored tools is ignored. Default auto."
    )
    thinking: ThinkingConfig | None = optional(
        "Whether the model reasons before it answers, and at most how long. Default: the model decides."
    )
    output_config: OutputConfig | None = optional("Format of the answer (a JSON schema), and reasoning effort.")
    output_format: OutputSchemaFormat | None = optional("Deprecated alias of output_config.format.")


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
    stream: bool | None = optional("Stream the answer as server-sent events.")
    metadata: dict[str, Any] | None = optional("Accepted and ignored.")
    service_tier: str | None = optional("Accepted and ignored.")
