"""A generation as OpenAI's items of output, and as the events that tell how they grow."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from msgspec import UNSET, UnsetType

from server.api.chat.schemas import TokenLogprob
from server.api.chat.writer import token_logprobs
from server.api.responses.event_schemas import (
    ArgumentsDelta,
    ArgumentsDone,
    Completed,
    Created,
    ErrorEvent,
    Event,
    Failed,
    Incomplete,
    InProgress,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    TextDelta,
    TextDone,
)
from server.api.responses.schemas import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
)
from server.api.responses.store import ResponseStore, StoredResponse
from server.generation.choice_state import Delta, Position, ToolCallDelta
from server.generation.event_writer import frame_events
from server.generation.token_fields import NO_FIELDS, TokenFields
from server.http.errors import APIError, ResponseGoneError
from server.schemas.common import Account, Usage
from server.text.parts import PartKind
from server.text.tokenizer import Tokenizer

# Why a choice ended -> what becomes of the response.
STATUSES: Mapping[str, Literal["completed", "incomplete", "cancelled"]] = {
    "stop": "completed",
    "tool_calls": "completed",
    "repetition": "completed",
    "length": "incomplete",
    "abort": "cancelled",
}


class ResponseWriter:
    """One choice. The output's last item is the one that grows; a whole answer is a stream whose events nobody sees."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stored: StoredResponse,
        store: ResponseStore | None,
        *,
        with_logprobs: bool,
        fields: TokenFields = NO_FIELDS,
    ) -> None:
        """`store` is None where the response is not to be kept."""
        self._tokenizer = tokenizer
        self._stored = stored
        self._store = store
        self._with_logprobs = with_logprobs
        self._fields = fields
        self._was_stored = store is not None and store.get(stored.response.id) is not None
        self._num_events = 0
        self._open: tuple[str, int] | None = None  # kind of the last item and which call it is; None: it is done
        self._finish_reason = "stop"
        self._positions: list[Position] = []  # of tokens whose log probabilities are not in the output yet

    @property
    def response(self) -> ResponseObject:
        return self._stored.response

    def events(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """Raises ResponseGoneError where events are kept for others, and none of these can come any more."""
        events = self._frame(chain(self._begin(), self._grow(deltas)))
        if self._stored.events is not None and self._stored.events.is_dropped:
            raise ResponseGoneError(self.response.id)
        return events

    def end(self, usage: Usage, account: Account | UnsetType = UNSET) -> bytes:
        self.response.lightwell = account
        return self._frame(chain(self._begin(), self._finish(usage), self._last()))

    def failure(self, error: APIError) -> bytes:
        return self._frame(chain(self._begin(), self._fail(error)))

    def answer(self, deltas: Sequence[Delta], usage: Usage, account: Account | UnsetType = UNSET) -> ResponseObject:
        self.response.lightwell = account
        for _ in chain(self._grow(deltas), self._finish(usage)):
            pass
        return self.response

    def _frame(self, events: Iterable[Event]) -> bytes:
        """Each event is written before the next one is made, for both show the same growing objects."""
        frames = []
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
            frames.append(frame_events([event]))
        if self._stored.events is not None and self._store is not None:
            self._store.count_events(self._stored)  # first, so that those who were not behind can read these
            self._stored.events.append(frames)
        return b"".join(frames)

    # The response as a whole.

    def _begin(self) -> Iterator[Event]:
        if self._num_events == 0:
            yield Created(response=self.response)
            yield InProgress(response=self.response)

    def _finish(self, usage: Usage) -> Iterator[Event]:
        status = STATUSES[self._finish_reason]
        yield from self._close("completed" if status == "completed" else "incomplete")
        self.response.status = status
        if self._finish_reason == "length":
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
        self.response.usage = _usage(usage)
        self._save()

    def _last(self) -> Iterator[Event]:
        kind = Completed if self.response.status == "completed" else Incomplete
        yield kind(response=self.response)

    def _fail(self, error: APIError) -> Iterator[Event]:
        self.response.status = "failed"
        self.response.error = ResponseError(error.message)
        self._save()
        yield Failed(response=self.response)

    def _save(self) -> None:
        """Unless it was deleted meanwhile."""
        if self._store is not None and (not self._was_stored or self._store.get(self.response.id) is not None):
            self._store.put(self._stored)

    # The items of its output.

    def _grow(self, deltas: Sequence[Delta]) -> Iterator[Event]:
        for delta in deltas:
            if self._with_logprobs:
                self._positions += delta.positions
            for part in delta.parts:
                if isinstance(part, ToolCallDelta):
                    yield from self._call(part)
                elif part.kind is PartKind.REASONING:
                    yield from self._think(part.text)
                else:
                    yield from self._write(part.text)
            if self._open == ("message", 0) and (logprobs := self._take_logprobs()):  # of tokens without a text
                yield self._text_delta("", logprobs)
            self._finish_reason = delta.finish_reason or "stop"

    def _think(self, text: str) -> Iterator[Event]:
        yield from self._switch(("reasoning", 0), lambda: ReasoningItem(id=_new_id("rs_"), content=[]), ReasoningText)
        item = self._item
        assert isinstance(item, ReasoningItem)
        item.content[0].text += text
        yield ReasoningDelta(**self._place(), delta=text)

    def _take_logprobs(self) -> list[TokenLogprob]:
        """Those of the tokens that are known to be content, up to the end of the last message."""
        if not self._positions:
            return []
        last = sum(isinstance(item, MessageItem) for item in self.response.output) - 1

        def is_later(position: Position) -> bool:
            return position.is_content is None or (position.is_content and position.content_index > last)

        num_taken = next((i for i, each in enumerate(self._positions) if is_later(each)), len(self._positions))
        taken, self._positions = self._positions[:num_taken], self._positions[num_taken:]
        return token_logprobs(self._tokenizer, [each for each in taken if each.is_content], self._fields)

    def _write(self, text: str) -> Iterator[Event]:
        """Log probabilities of tokens are known together with their text."""
        yield from self._switch(("message", 0), lambda: MessageItem(id=_new_id("msg_"), content=[]), OutputText)
        yield self._text_delta(text, self._take_logprobs())

    def _text_delta(self, text: str, logprobs: list[TokenLogprob]) -> Event:
        item = self._item
        assert isinstance(item, MessageItem)
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        return TextDelta(**self._place(), delta=text, logprobs=logprobs)

    def _call(self, call: ToolCallDelta) -> Iterator[Event]:
        def make() -> FunctionCallItem:
            return FunctionCallItem(id=_new_id("fc_"), call_id=call.id, name=call.name, arguments="")

        yield from self._switch(("function_call", call.index), make)
        item = self._item
        assert isinstance(item, FunctionCallItem)
        if call.arguments:
            item.arguments += call.arguments
            yield ArgumentsDelta(**self._place(), delta=call.arguments)

    @property
    def _item(self) -> OutputItem:
        return self.response.output[-1]

    def _place(self) -> dict[str, Any]:
        """Where the last item is."""
        return {"item_id": self._item.id, "output_index": len(self.response.output) - 1}

    def _switch(
        self,
        kind: tuple[str, int],
        make_item: Callable[[], OutputItem],
        make_part: Callable[[], OutputText | ReasoningText] | None = None,
    ) -> Iterator[Event]:
        """Only one item grows at a time, and has one part at most."""
        if self._open == kind:
            return
        yield from self._close("completed")
        self._open = kind
        self.response.output.append(make_item())
        yield ItemAdded(output_index=len(self.response.output) - 1, item=self._item)
        if make_part is not None:
            part: Any = make_part()
            yield PartAdded(**self._place(), part=part)
            self._item.content.append(part)  # type: ignore[union-attr]

    def _close(self, status: Status) -> Iterator[Event]:
        if self._open is None:
            return
        self._open = None
        item, place = self._item, self._place()
        item.status = status
        match item:
            case ReasoningItem():
                yield ReasoningDone(**place, text=item.content[0].text)
                yield PartDone(**place, part=item.content[0])
            case MessageItem():
                yield TextDone(**place, text=item.content[0].text, logprobs=item.content[0].logprobs)
                yield PartDone(**place, part=item.content[0])
            case FunctionCallItem():
                yield ArgumentsDone(**place, arguments=item.arguments)
        yield ItemDone(output_index=place["output_index"], item=item)


def error_event(error: APIError, sequence_number: int) -> bytes:
    """The end of a stream that cannot be read on."""
    event = ErrorEvent(sequence_number=sequence_number, code=error.code, message=error.message, param=error.param)
    return frame_events([event])


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(details.reasoning_tokens if details else 0),
        total_tokens=usage.total_tokens,
    )
