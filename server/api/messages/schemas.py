"""`POST /v1/messages`, Anthropic's API: its request, its answer, and the events of its stream.

https://docs.claude.com/en/api/messages and .../messages-streaming. What is known to change no text (cache_control,
citations, metadata) is accepted and has no effect: prefixes are cached in any case.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from server.api.chat.schemas import MAX_MESSAGES, MAX_PARTS
from server.schemas.common import Account
from server.schemas.samplers import INT64_MAX
from server.schemas.tools import MAX_TOOLS, ToolName

MAX_STOP_SEQUENCES = 64
MAX_STOP_SEQUENCE_CHARS = 128  # together they make an automaton of so many states

# Requests.


class Part(BaseModel):
    """Any object inside a request. Fields that no model declares are kept, and reported by their names."""

    model_config = ConfigDict(strict=True, extra="allow")

    cache_control: dict[str, Any] | None = None


class TextBlock(Part):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class PlainText(Part):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class TextContent(Part):
    type: Literal["content"]
    content: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class DocumentBlock(Part):
    """A document that is text. The model is shown its title, its context and its text."""

    type: Literal["document"]
    source: Annotated[PlainText | TextContent, Field(discriminator="type")]
    title: str | None = None
    context: str | None = Field(None, description="What else the model is told of the document.")
    citations: dict[str, Any] | None = Field(None, description="Accepted; answers cite nothing.")


ReadableBlock = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]


class ToolUseBlock(Part):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1)
    content: str | Annotated[list[ReadableBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    is_error: bool | None = Field(None, description="The tool failed: the model is told so before the content.")


class ThinkingBlock(Part):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Part):
    type: Literal["redacted_thinking"]
    data: str


UserBlock = Annotated[TextBlock | DocumentBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class UserMessage(Part):
    role: Literal["user", "ctx", "msg"] = Field(description="ctx and msg, which some clients send, are a user's.")
    content: str | Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class AssistantMessage(Part):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class SystemMessage(Part):
    """An instruction that holds from its place on."""

    role: Literal["system"]
    content: str | Annotated[list[TextBlock], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    clear_at: Literal["next_user_message", "never"] | None = Field(
        None, description="With next_user_message it is not shown where a user's message follows."
    )


InputMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]
StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_SEQUENCE_CHARS)]
StopSequences = Annotated[list[StopSequence], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)]


class Tool(Part):
    """A function of the client's. Tools that run on the server are not supported."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the tool's input.")
    strict: bool | None = None


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With type tool: which one.")
    disable_parallel_tool_use: bool | None = None


class Thinking(Part):
    type: Literal["enabled", "adaptive", "disabled"] = Field(description="adaptive leaves it to the model.")
    budget_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of thoughts at most, where the model's tags of thoughts are tokens; else max_tokens. With "
        "type enabled it must be there, and less than max_tokens.",
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted leaves thoughts out of the answer; they are never summarized."
    )


class OutputFormat(Part):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Handed to the chat template; has no effect where that reads none."
    )


class CountTokensRequest(BaseModel):
    """What of a request becomes the prompt."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="Name of the model, one of GET /v1/models.")
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="Older name of output_config.format.")


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, le=INT64_MAX, description="Tokens of the answer at most.")
    temperature: FiniteFloat | None = Field(None, ge=0, le=1, description="Default: the model's, or 1.")
    top_p: FiniteFloat | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=INT64_MAX)
    stop_sequences: StopSequences | None = Field(
        None, description=f"Up to {MAX_STOP_SEQUENCES} strings that end the text."
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted; has no effect.")
    service_tier: str | None = Field(None, description="Accepted; has no effect.")


# Answers.


class CountTokensResponse(msgspec.Struct, frozen=True):
    input_tokens: int


class Text(msgspec.Struct, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ToolUse(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ThinkingText(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


Block = Text | ToolUse | ThinkingText


class MessageUsage(msgspec.Struct, kw_only=True):
    """The prompt's tokens are the sum of the three kinds of input tokens."""

    input_tokens: int  # not found in the prefix cache
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    lightwell: Account | UnsetType = UNSET


# The events of a stream.


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    message: Message


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Block


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class InputJSONDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | InputJSONDelta | ThinkingDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    index: int


class StopDetails(msgspec.Struct):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    delta: StopDetails
    usage: MessageUsage
    lightwell: Account | UnsetType = UNSET


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    pass
