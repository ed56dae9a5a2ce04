"""Writes Anthropic messages: whole answers, and streams of content block events."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from server.generation.choice import ChoiceDelta, DeltaPart, ToolCallDelta
from server.generation.endpoint import AnswerMetadata
from server.generation.event_writer import encode_events
from server.http.errors import APIError
from server.parts.messages.errors import error_event
from server.parts.messages.schemas import (
    AnthropicMessage,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputBlock,
    OutputTextBlock,
    OutputThinkingBlock,
    OutputToolUseBlock,
    StopDetails,
    TextBlockDelta,
    ThinkingBlockDelta,
    ToolInputDelta,
)
from server.schemas.answers import RequestTimings, Usage
from server.text.parsers.answer_parts import PartKind

# Finish reason -> Anthropic's stop reason. `pause_turn` tells the client that it may continue with another request.
STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "repetition": "end_turn",
    "abort": "pause_turn",
}


class MessagesWriter:
    """Writes the one choice of an answer as content blocks: thinking, text and tool use."""

    repeats_output = False

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
            events.append(MessageStart(self._message([], None, None, usage())))
        for delta in deltas:
            events += self._additions(delta)
            self._last = delta
            self._has_calls |= bool(delta.tool_calls)
        return encode_events(events)

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        stop = StopDetails(*_stop(self._last, has_calls=self._has_calls))
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
        message = self._message(list(map(_block, shown.parts)), *_stop(delta, has_calls=bool(delta.tool_calls)), usage)
        message.lightwell = timings
        return message

    def _is_shown(self, part: DeltaPart) -> bool:
        return self._with_thinking or isinstance(part, ToolCallDelta) or part.kind is not PartKind.REASONING

    def _message(
        self, content: list[OutputBlock], reason: str | None, sequence: str | None, usage: Usage
    ) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._metadata.id,
            model=self._metadata.model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=_usage(usage),
        )

    def _additions(self, delta: ChoiceDelta) -> Iterator[msgspec.Struct]:
        for part in filter(self._is_shown, delta.parts):
            if isinstance(part, ToolCallDelta):
                yield from self._call(part)
            elif part.kind is PartKind.REASONING:
                yield from self._switch(("thinking", 0), OutputThinkingBlock(""))
                yield ContentBlockDelta(self._index, ThinkingBlockDelta(part.text))
            else:
                yield from self._switch(("text", 0), OutputTextBlock(""))
                yield ContentBlockDelta(self._index, TextBlockDelta(part.text))

    def _call(self, call: ToolCallDelta) -> Iterator[msgspec.Struct]:
        yield from self._switch(("tool_use", call.index), OutputToolUseBlock(call.id, call.name, {}))
        if call.arguments:
            yield ContentBlockDelta(self._index, ToolInputDelta(call.arguments))

    def _switch(self, block: tuple[str, int], start: OutputBlock) -> Iterator[msgspec.Struct]:
        """Start `block` unless it is open. At most one block is open at a time."""
        if self._open != block:
            yield from self._close()
            self._open = block
            yield ContentBlockStart(self._index, start)

    def _close(self) -> list[msgspec.Struct]:
        if self._open is None:
            return []
        self._open = None
        self._index += 1
        return [ContentBlockStop(self._index - 1)]


def _stop(delta: ChoiceDelta, *, has_calls: bool) -> tuple[str, str | None]:
    if delta.stop_string is not None:
        return "stop_sequence", delta.stop_string
    reason = STOP_REASONS[delta.finish_reason or "stop"]
    return "tool_use" if reason == "end_turn" and has_calls else reason, None


def _block(part: DeltaPart) -> OutputBlock:
    if isinstance(part, ToolCallDelta):
        return OutputToolUseBlock(part.id, part.name, part.decoded_arguments)
    return OutputThinkingBlock(part.text) if part.kind is PartKind.REASONING else OutputTextBlock(part.text)


def _usage(usage: Usage) -> MessageUsage:
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
    )
