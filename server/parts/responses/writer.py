"""Writes responses: the output items of a generation, and the events that report their growth."""

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.api.chat.writer import TokenLogprob, token_logprobs
from server.generation.choice import ChoiceDelta, DeltaPart, TokenPosition, ToolCallDelta
from server.generation.endpoint import NO_FIELDS, TokenFields, Writer
from server.http.error_formats import ErrorFormat
from server.http.errors import APIError
from server.parts.conversions.answers import encode_events
from server.parts.responses import schemas
from server.parts.responses.custom_tools import custom_input
from server.parts.responses.store import ResponseGoneError, ResponseStore, StoredResponse
from server.schemas.answers import RequestTimings, Usage
from server.text.parsers.answer_parts import PartKind
from server.text.tokenizer import Tokenizer

OutputTextPart = schemas.OutputText | schemas.ReasoningText


class StreamEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0


class ResponseEvent(StreamEvent, kw_only=True):
    """An event about the response as a whole."""

    response: schemas.ResponseObject


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
    item: schemas.OutputItem


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


AnyEvent = (
    (Created | InProgress | ItemAdded | PartAdded | OutputTextDelta | OutputTextDone | ReasoningDelta | ReasoningDone)
    | (ArgumentsDelta | ArgumentsDone | PartDone | CustomInputDelta | CustomInputDone)
    | (ItemDone | Completed | Incomplete | Failed | ErrorEvent)
)


# Finish reason -> status of the response.
STATUSES: Mapping[str, Literal["completed", "incomplete", "cancelled"]] = {
    "stop": "completed",
    "tool_calls": "completed",
    "repetition": "completed",
    "length": "incomplete",
    "abort": "cancelled",
}


MESSAGE, REASONING = ("message", 0), ("reasoning", 0)  # types of growing items


@dataclass(eq=False)
class ResponseWriter(Writer):
    """Writes the one choice of a response. Only the last output item grows.

    A non-streamed answer goes through the same steps, with the events discarded.
    """

    repeats_output = True

    tokenizer: Tokenizer
    stored: StoredResponse
    store: ResponseStore | None  # None: the response is not to be stored
    with_logprobs: bool = field(kw_only=True)
    custom_tools: Collection[str] = field(default=(), kw_only=True)  # their names
    fields: TokenFields = field(default=NO_FIELDS, kw_only=True)
    _arguments: str = field(default="", init=False)  # of the growing call of a custom tool
    _num_events: int = field(default=0, init=False)
    _num_messages: int = field(default=0, init=False)
    _open: tuple[str, int] | None = field(default=None, init=False)  # type of the growing item, and index of its call
    _finish_reason: str = field(default="stop", init=False)
    # Tokens whose log probabilities are not in the output yet.
    _positions: list[TokenPosition] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        assert self.stored.response is not None
        self.response = self.stored.response
        self._was_stored = self.store is not None and self.stored in self.store

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        """Return the encoded events. Raises ResponseGoneError if the event log was dropped, which leaves no reader."""
        events = self._encode(chain(self._begin(), self._grow(deltas)))
        if self.stored.events is not None and self.stored.events.is_dropped:
            raise ResponseGoneError(self.response.id)
        return events

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        self.response.lightwell = timings
        return self._encode(chain(self._begin(), self._finish(usage), self._last()))

    def failure(self, error: APIError) -> bytes:
        return self._encode(chain(self._begin(), self._fail(error)))

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType = UNSET
    ) -> schemas.ResponseObject:
        self.response.lightwell = timings
        for _ in chain(self._grow(deltas), self._finish(usage)):
            pass
        return self.response

    def _encode(self, events: Iterable[StreamEvent]) -> bytes:
        """Encode events one by one: later events contain the same objects, which have grown by then."""
        encoded = []
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
            encoded.append(encode_events([event]))
        if self.stored.events is not None and self.store is not None:
            # Before `append`: this may drop the log, and readers that are up to date must still get these events.
            self.store.count_events(self.stored)
            self.stored.events.append(encoded)
        return b"".join(encoded)

    # The response.

    def _begin(self) -> Iterator[StreamEvent]:
        if self._num_events == 0:
            yield Created(response=self.response)
            yield InProgress(response=self.response)

    def _finish(self, usage: Usage) -> Iterator[StreamEvent]:
        status = STATUSES[self._finish_reason]
        yield from self._close("completed" if status == "completed" else "incomplete")
        self.response.status = status
        if self._finish_reason == "length":
            self.response.incomplete_details = schemas.IncompleteDetails("max_output_tokens")
        self.response.usage = _usage(usage)
        self._save()

    def _last(self) -> Iterator[StreamEvent]:
        kind = Completed if self.response.status == "completed" else Incomplete
        yield kind(response=self.response)

    def _fail(self, error: APIError) -> Iterator[StreamEvent]:
        self.response.status = "failed"
        is_limit = error.status == 429
        self.response.error = schemas.ResponseError(
            error.message, "rate_limit_exceeded" if is_limit else "server_error"
        )
        self._save()
        yield Failed(response=self.response)

    def _save(self) -> None:
        """Store the response, unless it was deleted meanwhile."""
        if self.store is not None and (not self._was_stored or self.stored in self.store):
            self.store.put(self.stored)

    # Its output items.

    def _grow(self, deltas: Sequence[ChoiceDelta]) -> Iterator[StreamEvent]:
        for delta in deltas:
            if self.with_logprobs:
                self._positions += delta.positions
            for part in delta.parts:
                yield from self._add(part)
            if self._open == MESSAGE and (logprobs := self._take_logprobs()):  # of tokens that add no text
                yield self._text_delta("", logprobs)
            self._finish_reason = delta.finish_reason or "stop"

    def _add(self, part: DeltaPart) -> Iterator[StreamEvent]:
        """Add a part to the growing item, or begin another one."""
        if isinstance(part, ToolCallDelta):
            kind, text = ("function_call", part.index), part.arguments
        else:
            kind, text = REASONING if part.kind is PartKind.REASONING else MESSAGE, part.text
        if self._open != kind:
            yield from self._close("completed")
            self._open = kind
            yield from self._begin_item(part)
        match item := self._item:
            case schemas.MessageItem():
                yield self._text_delta(text, self._take_logprobs())
            case schemas.ReasoningItem():
                item.content[0].text += text
                yield ReasoningDelta(**self._location(), delta=text)
            case schemas.CustomCallItem():
                self._arguments += text
            case schemas.FunctionCallItem() if text:
                item.arguments += text
                yield ArgumentsDelta(**self._location(), delta=text)

    def _begin_item(self, part: DeltaPart) -> Iterator[StreamEvent]:
        """Add the item of a part to the output, and the part of its content, of which items have at most one."""
        content: schemas.OutputText | schemas.ReasoningText | None = None
        item: schemas.OutputItem
        if not isinstance(part, ToolCallDelta) and part.kind is PartKind.REASONING:
            item, content = schemas.ReasoningItem(id=_new_id("rs_"), content=[]), schemas.ReasoningText()
        elif not isinstance(part, ToolCallDelta):
            item, content = schemas.MessageItem(id=_new_id("msg_"), content=[]), schemas.OutputText()
            self._num_messages += 1
        elif part.name in self.custom_tools:
            item, self._arguments = schemas.CustomCallItem(id=_new_id("ctc_"), call_id=part.id, name=part.name), ""
        else:
            item = schemas.FunctionCallItem(id=_new_id("fc_"), call_id=part.id, name=part.name, arguments="")
        self.response.output.append(item)
        yield ItemAdded(output_index=len(self.response.output) - 1, item=item)
        if content is not None:
            yield PartAdded(**self._location(), part=content)
            item.content.append(content)  # type: ignore[union-attr, arg-type]

    def _take_logprobs(self) -> list[TokenLogprob]:
        """Remove and return the pending log probabilities of tokens in the message items so far.

        Tokens stay pending while it is undetermined whether they are content, or if they belong to a later message.
        """
        if not self._positions:
            return []

        def is_later(position: TokenPosition) -> bool:
            return position.is_content is None or (position.is_content and position.content_index >= self._num_messages)

        num_taken = next((i for i, each in enumerate(self._positions) if is_later(each)), len(self._positions))
        taken = self._positions[:num_taken]
        del self._positions[:num_taken]
        return token_logprobs(self.tokenizer, [each for each in taken if each.is_content], self.fields)

    def _text_delta(self, text: str, logprobs: list[TokenLogprob]) -> StreamEvent:
        item = self._item
        assert isinstance(item, schemas.MessageItem)
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        return OutputTextDelta(**self._location(), delta=text, logprobs=logprobs)

    @property
    def _item(self) -> schemas.OutputItem:
        return self.response.output[-1]

    def _location(self) -> dict[str, Any]:
        """Return the event fields that locate the last output item."""
        return {"item_id": self._item.id, "output_index": len(self.response.output) - 1}

    def _close(self, status: schemas.ItemStatus) -> Iterator[StreamEvent]:
        if self._open is None:
            return
        self._open = None
        item, location = self._item, self._location()
        item.status = status
        match item:
            case schemas.ReasoningItem():
                yield ReasoningDone(**location, text=item.content[0].text)
                yield PartDone(**location, part=item.content[0])
            case schemas.MessageItem():
                yield OutputTextDone(**location, text=item.content[0].text, logprobs=item.content[0].logprobs)
                yield PartDone(**location, part=item.content[0])
            case schemas.FunctionCallItem():
                yield ArgumentsDone(**location, arguments=item.arguments)
            case schemas.CustomCallItem():  # its input is known once the JSON string around it is complete
                item.input = custom_input(self._arguments)
                yield CustomInputDelta(**location, delta=item.input)
                yield CustomInputDone(**location, input=item.input)
        yield ItemDone(output_index=location["output_index"], item=item)


def error_event(error: APIError, sequence_number: int) -> bytes:
    """Return the encoded event that ends a stream which cannot be continued."""
    event = ErrorEvent(sequence_number=sequence_number, code=error.code, message=error.message, param=error.param)
    return encode_events([event])


RESPONSES_ERRORS = ErrorFormat(paths=re.compile(r"/v1/responses(/|\Z)"), last_events=error_event)


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def _usage(usage: Usage) -> schemas.ResponseUsage:
    details = usage.completion_tokens_details
    return schemas.ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=schemas.InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=schemas.OutputTokensDetails(details.reasoning_tokens if details else 0),
        total_tokens=usage.total_tokens,
    )
