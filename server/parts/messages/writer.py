"""Writes what Anthropic's clients get: messages, streams of content block events, errors and models."""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.api.admin import Model, ModelFormat
from server.generation.choice import ChoiceDelta, DeltaPart, ToolCallDelta
from server.generation.endpoint import AnswerMetadata, Writer
from server.http.error_formats import ErrorFormat
from server.http.errors import INVALID_REQUEST, APIError, ContextLengthExceededError
from server.parts.conversions.answers import arguments_of, encode_events, named_message
from server.schemas.answers import RequestTimings, Usage
from server.text.parsers.answer_parts import PartKind


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
    stop_reason: str | None = None
    stop_sequence: str | None = None
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


MessageEvent = MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop


VERSION_HEADER = b"anthropic-version"  # that all of Anthropic's clients send
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Anthropic's envelope. Error events of a stream have no id, which is in the headers of the response."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None = None


def error_body(error: APIError, request_id: str | None = None) -> bytes:
    message = _too_long(error) if isinstance(error, ContextLengthExceededError) else named_message(error)
    detail = AnthropicErrorDetail(TYPES.get(error.status, INVALID_REQUEST), message)
    return msgspec.json.encode(AnthropicErrorResponse(type="error", error=detail, request_id=request_id))


def _too_long(error: ContextLengthExceededError) -> str:
    """Return Anthropic's wording, which its clients parse to know by how much to shorten the input."""
    if error.max_tokens is None:
        return f"prompt is too long: {error.num_prompt_tokens} tokens > {error.max_model_len} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {error.num_prompt_tokens} + {error.max_tokens} > "
        f"{error.max_model_len}, decrease input length or `max_tokens` and try again"
    )


def error_event(error: APIError, num_events: int = 0) -> bytes:
    """Return the last event of a stream that failed."""
    return b"event: error\ndata: " + error_body(error) + b"\n\n"


ANTHROPIC_ERRORS = ErrorFormat(
    paths=re.compile(r"/v1/messages(/|\Z)"),
    header=VERSION_HEADER,
    schema=AnthropicErrorResponse,
    body=error_body,
    last_events=error_event,
    id_headers=("x-request-id", "request-id"),  # the second is what Anthropic's clients read
)


class AnthropicModel(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="model"):
    id: str
    display_name: str
    created_at: str  # RFC 3339
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None  # None: not known before the model is loaded


class AnthropicModelList(msgspec.Struct, frozen=True, kw_only=True):
    data: list[AnthropicModel]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class AnthropicModels(ModelFormat):
    """The models in Anthropic's format."""

    def of_model(self, model: Model) -> AnthropicModel:
        created_at = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
        return AnthropicModel(
            id=model.id, display_name=model.id, created_at=created_at, max_input_tokens=model.max_model_len
        )

    def of_list(self, models: list[Model]) -> AnthropicModelList:
        found = [self.of_model(model) for model in models]
        return AnthropicModelList(data=found, first_id=found[0].id, last_id=found[-1].id)


# Finish reason -> Anthropic's stop reason. `pause_turn` tells the client that it may continue with another request.
STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "repetition": "end_turn",
    "abort": "pause_turn",
}


class MessagesWriter(Writer):
    """Writes the one choice of an answer as content blocks: thinking, text and tool use."""

    def __init__(self, metadata: AnswerMetadata, *, with_thinking: bool = True) -> None:
        self._metadata = metadata
        self._with_thinking = with_thinking
        self._has_started = False
        self._index = 0  # of the open block, or of the next one
        self._open: tuple[str, int] | None = None  # type of the open block, and index of its tool call
        self._last = ChoiceDelta(0)  # holds the finish reason
        self._has_calls = False

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        events: list[msgspec.Struct] = []
        if deltas and not self._has_started:
            self._has_started = True
            events.append(MessageStart(self._message([], usage())))
        for delta in deltas:
            events += self._additions(delta)
            self._last = delta
            self._has_calls |= bool(delta.tool_calls)
        return encode_events(events)

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        stop = _stop(self._last, has_calls=self._has_calls)
        return encode_events([*self._close(), MessageDelta(stop, _usage(usage), timings), MessageStop()])

    def failure(self, error: APIError) -> bytes:
        return error_event(error)

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType = UNSET
    ) -> AnthropicMessage:
        (delta,) = deltas
        shown = ChoiceDelta(0)
        for part in filter(self._is_shown, delta.parts):
            shown.write(part)
        stop = _stop(delta, has_calls=bool(delta.tool_calls))
        message = self._message(list(map(_block, shown.parts)), usage)
        message.stop_reason, message.stop_sequence, message.lightwell = stop.stop_reason, stop.stop_sequence, timings
        return message

    def _is_shown(self, part: DeltaPart) -> bool:
        return self._with_thinking or isinstance(part, ToolCallDelta) or part.kind is not PartKind.REASONING

    def _message(self, content: list[OutputBlock], usage: Usage) -> AnthropicMessage:
        return AnthropicMessage(id=self._metadata.id, model=self._metadata.model, content=content, usage=_usage(usage))

    def _additions(self, delta: ChoiceDelta) -> Iterator[msgspec.Struct]:
        """Yield the events of new parts. At most one block is open at a time."""
        for part in filter(self._is_shown, delta.parts):
            addition: TextBlockDelta | ToolInputDelta | ThinkingBlockDelta
            start: OutputBlock
            if isinstance(part, ToolCallDelta):
                block, addition = ("tool_use", part.index), ToolInputDelta(part.arguments)
                start = OutputToolUseBlock(part.id, part.name, {})
            elif part.kind is PartKind.REASONING:
                block, addition, start = ("thinking", 0), ThinkingBlockDelta(part.text), OutputThinkingBlock("")
            else:
                block, addition, start = ("text", 0), TextBlockDelta(part.text), OutputTextBlock("")
            if self._open != block:
                yield from self._close()
                self._open = block
                yield ContentBlockStart(self._index, start)
            if not isinstance(part, ToolCallDelta) or part.arguments:
                yield ContentBlockDelta(self._index, addition)

    def _close(self) -> list[msgspec.Struct]:
        if self._open is None:
            return []
        self._open = None
        self._index += 1
        return [ContentBlockStop(self._index - 1)]


def _stop(delta: ChoiceDelta, *, has_calls: bool) -> StopDetails:
    if delta.stop_string is not None:
        return StopDetails("stop_sequence", delta.stop_string)
    reason = STOP_REASONS[delta.finish_reason or "stop"]
    return StopDetails("tool_use" if reason == "end_turn" and has_calls else reason, None)


def _block(part: DeltaPart) -> OutputBlock:
    if isinstance(part, ToolCallDelta):
        return OutputToolUseBlock(part.id, part.name, arguments_of(part))
    return OutputThinkingBlock(part.text) if part.kind is PartKind.REASONING else OutputTextBlock(part.text)


def _usage(usage: Usage) -> MessageUsage:
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
    )
