"""The events of a stream of `POST /v1/responses`, numbered in their order."""

import msgspec

from server.api.chat.schemas import TokenLogprob
from server.api.responses.schemas import OutputItem, OutputText, ReasoningText, ResponseObject

TextPart = OutputText | ReasoningText


class Event(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0


class ResponseEvent(Event, kw_only=True):
    """About the response as a whole."""

    response: ResponseObject


class Created(ResponseEvent, kw_only=True, tag="response.created"): ...


class InProgress(ResponseEvent, kw_only=True, tag="response.in_progress"): ...


class Completed(ResponseEvent, kw_only=True, tag="response.completed"): ...


class Incomplete(ResponseEvent, kw_only=True, tag="response.incomplete"): ...


class Failed(ResponseEvent, kw_only=True, tag="response.failed"): ...


class ErrorEvent(Event, kw_only=True, tag="error"):
    """A stream cannot go on, whatever becomes of the response."""

    code: str | None
    message: str
    param: str | None = None


class ItemEvent(Event, kw_only=True):
    output_index: int
    item: OutputItem


class ItemAdded(ItemEvent, kw_only=True, tag="response.output_item.added"): ...


class ItemDone(ItemEvent, kw_only=True, tag="response.output_item.done"): ...


class InItem(Event, kw_only=True):
    """About something in an item of the output."""

    item_id: str
    output_index: int


class InPart(InItem, kw_only=True):
    content_index: int = 0


class PartAdded(InPart, kw_only=True, tag="response.content_part.added"):
    part: TextPart


class PartDone(InPart, kw_only=True, tag="response.content_part.done"):
    part: TextPart


class TextDelta(InPart, kw_only=True, tag="response.output_text.delta"):
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(InPart, kw_only=True, tag="response.output_text.done"):
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(InPart, kw_only=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(InPart, kw_only=True, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(InItem, kw_only=True, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(InItem, kw_only=True, tag="response.function_call_arguments.done"):
    arguments: str
