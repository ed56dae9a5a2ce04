"""The state of one choice while it is generated: converts the engine's events to deltas."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.generation.choice_delta import ChoiceDelta, TokenPosition, ToolCallDelta
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parser import Parser
from server.text.parsers.answer_parts import AnswerPart, PartKind


class ChoiceParser:
    """Parses the text of one choice into parts, and assigns ids to its tool calls."""

    def __init__(self, parser: Parser, choice_id: str) -> None:
        """Prepare the parser. The ids of tool calls are derived from `choice_id`, which must be unique."""
        self._parser = parser
        self._choice_id = choice_id
        self._num_calls = 0
        self.num_contents = 0  # runs of content, separated by reasoning or calls
        self.last_is_content = False

    @property
    def is_reasoning(self) -> bool:
        return self._parser.is_reasoning

    @property
    def finish_reason(self) -> str:
        """Finish reason of a choice that the model ended."""
        return self._parser.format.calls_end if self._parser.ends_with_calls else FinishReason.STOP.value

    @property
    def num_held(self) -> int:
        """Number of characters at the end of the text whose kind is undecided."""
        return self._parser.num_held

    def push(self, text: str, delta: ChoiceDelta) -> bool | None:
        """Parse more text and add its parts to `delta`.

        Returns whether any of the parts is content, or None if `text` is held back because it may begin a tag.
        """
        parts = self._parser.push(text)
        self._write_all(parts, delta)
        if not parts:
            return None if self._parser.is_holding else False  # False: a tag, or line breaks next to one
        return any(part.kind is PartKind.CONTENT for part in parts)

    def finish(self, delta: ChoiceDelta) -> None:
        """Add the remaining parts to `delta`."""
        self._write_all(self._parser.finish(), delta)

    def _write_all(self, parts: Sequence[AnswerPart], delta: ChoiceDelta) -> None:
        for part in parts:
            self._write(part, delta)

    def _write(self, part: AnswerPart, delta: ChoiceDelta) -> None:
        is_content = part.kind is PartKind.CONTENT
        self.num_contents += is_content and not self.last_is_content
        self.last_is_content = is_content
        match part.kind:
            case PartKind.CALL:
                delta.write(ToolCallDelta(self._num_calls, self._call_id(), part.text, ""))
                self._num_calls += 1
            case PartKind.ARGUMENTS:
                delta.write(ToolCallDelta(self._num_calls - 1, "", "", part.text))
            case _:
                delta.write(part)

    def _call_id(self) -> str:
        digest = hashlib.sha256(f"{self._choice_id}-{self._num_calls}".encode()).hexdigest()
        length = self._parser.format.tool_format.id_length
        return f"call_{digest[:24]}" if length is None else digest[:length]


class ChoiceState:
    """Converts the events of one choice to deltas. A token's log probabilities are released together with its text."""

    def __init__(
        self,
        index: int,
        text: ChoiceText,
        *,
        include_stop: bool,
        stop_token_ids: Sequence[int] = (),
        parser: ChoiceParser | None = None,
    ) -> None:
        """Prepare the state of the choice at `index` of the answer.

        `stop_token_ids` are the request's, without the model's own. Without a parser all text is content.
        """
        self.index = index
        self.num_tokens = 0  # up to the end of the text, including a stop string and an end token
        self.num_reasoning_tokens = 0  # tokens after which the model was still reasoning
        self.finish_reason: str | None = None
        self.seconds = 0.0  # spent in `push`
        self._text = text
        self._include_stop = include_stop
        self._stop_token_ids = frozenset(stop_token_ids)
        self._parser = parser
        self._num_chars = 0  # of released text
        self._held: list[TokenPosition] = []  # of tokens whose text is not released
        self._undecided: list[TokenPosition] = []  # of tokens that may or may not be content

    def push(self, event: TokenEvent) -> ChoiceDelta:
        """Return the output that an event adds. The event must not be an error, nor follow the end of the choice."""
        assert self.finish_reason is None
        start, text = time.perf_counter(), self._text
        num_seen = text.num_tokens
        hides_last = event.stop_token_id is not None and not self._include_stop
        delta, pieces = ChoiceDelta(self.index), list[str]()
        for number, token_id in enumerate(event.token_ids[:-1] if hides_last else event.token_ids):
            piece = text.push((token_id,))
            if event.logprobs is not None:
                self._hold(token_id, event.logprobs[number], text.offsets[-1])
            if piece and self._parser is None:
                self._num_chars += len(piece)
                pieces.append(piece)
            elif piece:
                self._add_text(piece, delta)
            if self._parser is not None:
                self.num_reasoning_tokens += self._parser.is_reasoning
            if text.stopped is not None:
                break
        if pieces:
            delta.parts.append(AnswerPart(PartKind.CONTENT, "".join(pieces)))
        ends_hidden = hides_last and text.stopped is None
        if event.finish_reason is not None or text.stopped is not None:
            self._end(event, delta)
        if ends_hidden and event.logprobs is not None:
            self._hold(event.token_ids[-1], event.logprobs[-1], self._num_chars)
            self._held[-1].is_hidden_end = True
        num_new = text.num_tokens - num_seen + ends_hidden
        self.num_tokens += num_new
        if self._held or self._undecided:
            delta.positions = self._release()
        delta.token_ids = event.token_ids[:num_new]
        self.seconds += time.perf_counter() - start
        return delta

    def abort(self) -> ChoiceDelta:
        """End the choice early, and return the output that was held back."""
        delta = ChoiceDelta(self.index, finish_reason=FinishReason.ABORT.value)
        if text := self._text.finish():
            self._add_text(text, delta)
        if self._parser is not None:
            self._parser.finish(delta)
        self.finish_reason = delta.finish_reason
        delta.positions = self._release()
        return delta

    @property
    def stopped_by_text(self) -> bool:
        return self._text.stopped is not None

    def _add_text(self, text: str, delta: ChoiceDelta) -> None:
        self._num_chars += len(text)
        if self._parser is None:
            delta.write(AnswerPart(PartKind.CONTENT, text))
        else:
            is_content = self._parser.push(text, delta)
            if is_content is not None and self._undecided:
                self._decide(is_content, self._num_chars - self._parser.num_held)

    def _decide(self, is_content: bool, end: int | None = None) -> None:
        """Record whether the undecided tokens that begin before character `end` are content, and which run of it."""
        assert self._parser is not None
        decided = [position for position in self._undecided if end is None or position.offset < end]
        for position in decided:
            position.is_content, position.content_index = is_content, self._parser.num_contents - 1
        del self._undecided[: len(decided)]

    def _end(self, event: TokenEvent, delta: ChoiceDelta) -> None:
        """Add the remaining text and the finish reason to `delta`: the choice ends with this event."""
        if self._text.stopped is not None:
            self.finish_reason = FinishReason.STOP.value
        elif event.finish_reason is not None:
            if text := self._text.finish():
                self._add_text(text, delta)
            self.finish_reason = event.finish_reason.value
        if self._parser is not None:
            self._parser.finish(delta)
            if self.finish_reason == FinishReason.STOP:
                self.finish_reason = self._parser.finish_reason
        delta.finish_reason = self.finish_reason
        delta.stop_string = self._text.stopped
        if delta.stop_string is None and event.stop_token_id in self._stop_token_ids:
            delta.stop_token_id = event.stop_token_id

    def _hold(self, token_id: int, logprobs: TokenLogprobs, offset: int) -> None:
        position = TokenPosition(token_id, logprobs, offset)
        self._held.append(position)
        if self._parser is not None:
            position.is_content = None
            self._undecided.append(position)

    def _release(self) -> list[TokenPosition]:
        """Return the tokens whose text is released; at the end all tokens except the tokens of a hidden stop string."""
        if self.finish_reason is not None and self._parser is not None:
            self._decide(self._parser.last_is_content)
        if self.finish_reason is not None and not (self.stopped_by_text and not self._include_stop):
            num_free = len(self._held)
        else:
            num_free = next((i for i, held in enumerate(self._held) if held.offset >= self._num_chars), len(self._held))
        free = self._held[:num_free]
        del self._held[:num_free]  # which costs nothing if there are none, though very many may be held
        return free
