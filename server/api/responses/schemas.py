"""`POST /v1/responses`, OpenAI's newer API: its request and what it answers with.

https://platform.openai.com/docs/api-reference/responses. The events of its stream are in `response_events`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, FiniteFloat, Tag

from server.api.chat.schemas import MAX_MESSAGES, MAX_PARTS, TemplateOptions, TokenLogprob
from server.schemas.common import Account, Stop
from server.schemas.samplers import INT64_MAX
from server.schemas.tools import MAX_TOOLS, ToolName

MAX_METADATA = 16  # entries
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters

# Requests.


class Part(BaseModel):
    """Any object inside a request. Fields that no model declares are kept, and reported by their names."""

    model_config = ConfigDict(strict=True, extra="allow")


class InputText(Part):
    type: Literal["input_text"]
    text: str


class PastText(Part):
    """The text of an earlier answer, as it was sent."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class PastRefusal(Part):
    """What an earlier answer, of another model, said instead. It is text as any other."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


TextPart = Annotated[InputText | PastText | PastRefusal, Field(discriminator="type")]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class Item(Part):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputMessage(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | TextParts
    phase: str | None = None


class PastCall(Item):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str


class CallOutput(Item):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: str | TextParts


class PastReasoningText(Part):
    type: Literal["reasoning_text"]
    text: str


class PastReasoning(Item):
    """The thoughts of an earlier answer."""

    type: Literal["reasoning"]
    content: Annotated[list[PastReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None


class ItemReference(Part):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: str = Field(min_length=1)


def _name_type(value: object) -> object:
    """Messages may leave out their type, and so may references, which are nothing but an id."""
    if not isinstance(value, dict) or value.get("type") is not None:
        return value
    is_reference = value.keys() - {"type"} == {"id"}
    return value | {"type": "item_reference" if is_reference else "message"}


GivenItem = InputMessage | PastCall | CallOutput | PastReasoning
InputItem = Annotated[
    Annotated[GivenItem | ItemReference, Field(discriminator="type")],
    BeforeValidator(_name_type),
]


class FunctionTool(Part):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(BaseModel):
    """A tool that the server of the model would have to run, or of a form that it does not know. It is left out."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str


def _kind_of_tool(value: object) -> str:
    kind = value.get("type", "function") if isinstance(value, dict) else getattr(value, "type", "function")
    return "function-tool" if kind == "function" else "other-tool"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function-tool")] | Annotated[OtherTool, Tag("other-tool")],
    Discriminator(_kind_of_tool),
]


class NamedTool(Part):
    type: Literal["function"]
    name: str


class AllowedTools(Part):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def _kind_of_choice(value: object) -> str:
    return "choice-of-tools" if isinstance(value, dict | BaseModel) else "choice-word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("choice-word")]
    | Annotated[Annotated[NamedTool | AllowedTools, Field(discriminator="type")], Tag("choice-of-tools")],
    Discriminator(_kind_of_choice),
]


class PlainFormat(Part):
    type: Literal["text", "json_object"]


class SchemaFormat(Part):
    type: Literal["json_schema"]
    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Part):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Without effect; other values than medium are reported."
    )


class Reasoning(Part):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Handed to the chat template. Without effect, and reported, where that reads none."
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Accepted; thoughts are answered with as they are, not summarized."
    )


Included = Literal[
    "message.output_text.logprobs",
    # About tools that do not exist here, or about thoughts, which are not encrypted.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseStreamOptions(Part):
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added to the events either way.")


def _check_metadata(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if len(name) > MAX_METADATA_KEY:
            raise ValueError(f"expected keys of at most {MAX_METADATA_KEY} characters, but got one of {len(name)}.")
        if len(text) > MAX_METADATA_VALUE:
            limit = f"at most {MAX_METADATA_VALUE} characters"
            raise ValueError(f"expected values of {limit}, but that of '{name}' has {len(text)}.")
    return value


Metadata = Annotated[dict[str, str], Field(max_length=MAX_METADATA), AfterValidator(_check_metadata)]


class ResponsesRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="Name of the model, one of GET /v1/models.")
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = (
        Field(None, description="What the model answers. Optional only with previous_response_id.")
    )
    instructions: str | None = Field(None, description="A system message before all else. Holds for this request.")
    previous_response_id: str | None = Field(None, description="A stored response whose conversation goes on.")
    max_output_tokens: int | None = Field(
        None, ge=1, le=INT64_MAX, description="Default: what the context has room for."
    )
    temperature: FiniteFloat | None = Field(None, ge=0, le=2, description="Default: the model's, or 1.")
    top_p: FiniteFloat | None = Field(None, gt=0, le=1, description="Default: the model's, or 1.")
    include: Annotated[list[Included], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Alternatives of each token; include message.output_text.logprobs."
    )
    stop: Stop = Field(None, description="Up to four strings that end the text; they are not part of it.")
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the model may call. Tools of other types are left out, and reported."
    )
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1, description="Accepted; there are no built-in tools to count.")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateOptions | None = Field(
        None, description="Values of variables that the model's chat template reads, such as enable_thinking."
    )
    truncation: Literal["disabled", "auto"] | None = Field(
        None,
        description="auto: where the conversation is too long, its oldest turns are left out, but no instructions. "
        "Default disabled: it is refused.",
    )
    metadata: Metadata | None = Field(None, description="Answered with.")
    user: str | None = Field(None, description="Answered with.")
    safety_identifier: str | None = Field(None, description="Answered with.")
    prompt_cache_key: str | None = Field(None, description="Answered with; prefixes are found without it.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = Field(
        None, description="Accepted; there is one tier, default."
    )
    store: bool | None = Field(None, description="Keep the response for a while, to be asked for. Default true.")
    background: bool | None = Field(
        None, description="Answer at once, and generate without a connection. With stream the events are kept."
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: ResponseStreamOptions | None = None


class InputTokensRequest(ResponsesRequest):
    """A request whose prompt is counted. What has no part in the prompt is judged all the same."""

    model: str | None = Field(None, description="One of GET /v1/models. Default: the first.")  # type: ignore[assignment]


# Answers.

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    text: str = ""


class MessageItem(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[Any] = []
    content: list[ReasoningText]
    status: Status = "in_progress"


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "in_progress"


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


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
    code: str = "server_error"


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response and what was asked for, with the defaults filled in."""

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
    lightwell: Account | UnsetType = UNSET


class DeletedResponse(msgspec.Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(msgspec.Struct, frozen=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the items that a response was made of."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
