"""The events of a `POST /v1/responses` stream. `sequence_number` counts them."""

import msgspec

from server.api.chat.schemas import TokenLogprob
from server.parts.responses.schemas import OutputItem, OutputText, ReasoningText, ResponseObject

OutputTextPart = OutputText | ReasoningText


class StreamEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0


class ResponseEvent(StreamEvent, kw_only=True):
    """An event about the response as a whole."""

    response: ResponseObject


class Created(ResponseEvent, kw_only=True, tag="response.created"): ...


class InProgress(ResponseEvent, kw_only=True, tag="response.in_progress"): ...


class Completed(ResponseEvent, kw_only=True, tag="response.completed"): ...


class Incomplete(ResponseEvent, kw_only=True, tag="response.incomplete"): ...


class Failed(ResponseEvent, kw_only=True, tag="response.failed"): ...


class ErrorEvent(StreamEvent, kw_only=True, tag="error"):
    """The stream cannot be continued. The response itself may still complete."""

    code: str | None
    message: str
    param: str | None = None


class ItemEvent(StreamEvent, kw_only=True):
    output_index: int
    item: OutputItem


class ItemAdded(ItemEvent, kw_only=True, tag="response.output_item.added"): ...


class ItemDone(ItemEvent, kw_only=True, tag="response.output_item.done"): ...


class ItemContentEvent(StreamEvent, kw_only=True):
    """An event about the content of an output item."""

    item_id: str
    output_index: int


class ContentPartEvent(ItemContentEvent, kw_only=True):
    content_index: int = 0


class PartAdded(ContentPartEvent, kw_only=True, tag="response.content_part.added"):
    part: OutputTextPart


class PartDone(ContentPartEvent, kw_only=True, tag="response.content_part.done"):
    part: OutputTextPart


class OutputTextDelta(ContentPartEvent, kw_only=True, tag="response.output_text.delta"):
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(ContentPartEvent, kw_only=True, tag="response.output_text.done"):
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(ContentPartEvent, kw_only=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(ContentPartEvent, kw_only=True, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(ItemContentEvent, kw_only=True, tag="response.function_call_arguments.delta"):
    delta: str


class CustomInputDelta(ItemContentEvent, kw_only=True, tag="response.custom_tool_call_input.delta"):
    delta: str


class CustomInputDone(ItemContentEvent, kw_only=True, tag="response.custom_tool_call_input.done"):
    input: str


class ArgumentsDone(ItemContentEvent, kw_only=True, tag="response.function_call_arguments.done"):
    arguments: str
