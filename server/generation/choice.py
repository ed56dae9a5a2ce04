"""One choice: its state while it is generated, and its output, in pieces or as a whole, as writers receive it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parser import Parser
from server.text.parsers.answer_parts import AnswerPart, PartKind

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI uses this value for "very unlikely"


def json_logprob(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass(slots=True)
class TokenPosition:
    """A token of an answer with its log probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None  # None: the first token of a prompt
    offset: int  # characters of the choice's text before the token
    is_content: bool | None = True  # None: undecided, for example while "<" may begin a tag
    content_index: int = 0  # which run of content the token is in, as calls may interrupt content; set with is_content
    is_hidden_end: bool = False  # it ended the choice, and is not part of its text


@dataclass(slots=True)
class ToolCallDelta:
    """New output of a tool call. The first delta of a call has its id and name."""

    index: int  # of the call in its choice
    id: str  # "" after the first delta
    name: str  # "" after the first delta
    arguments: str  # a piece of the JSON text


DeltaPart = AnswerPart | ToolCallDelta


@dataclass(slots=True)
class ChoiceDelta:
    """New output of a choice: a piece of it in a stream, otherwise all of it."""

    index: int
    parts: list[DeltaPart] = field(default_factory=list)  # in the order in which the model wrote them
    positions: list[TokenPosition] = field(default_factory=list)  # empty unless log probabilities are requested
    finish_reason: str | None = None  # stop, length, tool_calls, repetition or abort
    stop_string: str | None = None  # the stop string that ended the text, if one did
    stop_reason: str | int | None = None  # this, or the one of the request's stop_token_ids that ended it
    token_ids: list[int] = field(default_factory=list)  # the tokens that the usage counts
    num_bytes: int = 0  # of its events, as an `AnswerShare` counts them

    @property
    def text(self) -> str:
        """The content, without reasoning and tool calls."""
        return "".join(
            [each.text for each in self.parts if isinstance(each, AnswerPart) and each.kind is PartKind.CONTENT]
        )

    @property
    def reasoning(self) -> str:
        return "".join(
            [each.text for each in self.parts if isinstance(each, AnswerPart) and each.kind is PartKind.REASONING]
        )

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        """The deltas of tool calls, at most one for each call."""
        return [part for part in self.parts if isinstance(part, ToolCallDelta)]

    def write(self, part: DeltaPart) -> None:
        """Append a part, joining it with the last one if they belong together."""
        if not (self.parts and _continues(self.parts[-1], part)):
            self.parts.append(part)
            return
        last = self.parts[-1]
        if isinstance(last, AnswerPart):
            self.parts[-1] = AnswerPart(last.kind, last.text + _text(part))
        else:
            last.arguments += _text(part)


def _continues(last: DeltaPart, part: DeltaPart) -> bool:
    """Return whether `part` continues the part before it."""
    if isinstance(last, AnswerPart):
        return isinstance(part, AnswerPart) and last.kind is part.kind
    return isinstance(part, ToolCallDelta) and last.index == part.index


def _text(part: DeltaPart) -> str:
    return part.text if isinstance(part, AnswerPart) else part.arguments


class ChoiceAccumulator:
    """Joins deltas of a choice. Their texts are joined once, as an answer may have very many deltas."""

    def __init__(self, index: int) -> None:
        self._delta = ChoiceDelta(index)
        self._texts: list[list[str]] = []  # pieces of each part

    def add(self, delta: ChoiceDelta) -> None:
        parts = self._delta.parts
        for part in delta.parts:
            if not (parts and _continues(parts[-1], part)):
                parts.append(part)
                self._texts.append([])
            self._texts[-1].append(_text(part))
        self._delta.positions += delta.positions
        self._delta.token_ids += delta.token_ids
        self._delta.num_bytes += delta.num_bytes
        self._delta.finish_reason = delta.finish_reason
        self._delta.stop_string, self._delta.stop_reason = delta.stop_string, delta.stop_reason

    def join(self) -> ChoiceDelta:
        """Return one delta with the output of all. Called once, after the last `add`."""
        joined = zip(self._delta.parts, map("".join, self._texts), strict=True)
        self._delta.parts = [
            AnswerPart(part.kind, text) if isinstance(part, AnswerPart) else replace(part, arguments=text)
            for part, text in joined
        ]
        return self._delta


def join_deltas(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """Return one delta with the output of all, which are of one choice."""
    if len(deltas) == 1:
        return deltas[0]
    whole = ChoiceAccumulator(deltas[0].index)
    for delta in deltas:
        whole.add(delta)
    return whole.join()


def best_choices(choices: Sequence[ChoiceDelta], num_choices: int, num_best: int) -> Sequence[ChoiceDelta]:
    """Return the `num_best` of each prompt's `num_choices` choices with the highest mean log probability.

    They are sorted best first and renumbered. If all are to be returned, they stay as they are.
    """
    if num_best == num_choices:
        return choices
    best: list[ChoiceDelta] = []
    for first in range(0, len(choices), num_choices):
        ranked = sorted(choices[first : first + num_choices], key=_mean_logprob, reverse=True)
        best += ranked[:num_best]
    return [replace(delta, index=index) for index, delta in enumerate(best)]


def _mean_logprob(delta: ChoiceDelta) -> float:
    logprobs = [position.logprobs.logprob for position in delta.positions if position.logprobs is not None]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


class Pacer:
    """Joins the deltas of each choice until they hold a number of tokens. Its first and last delta do not wait."""

    def __init__(self, next_batch: Callable[[], Awaitable[list[ChoiceDelta] | None]], num_tokens: int) -> None:
        """`next_batch` returns None at the end."""
        self._next_batch = next_batch
        self._num_tokens = num_tokens
        self._started: set[int] = set()
        self._held: dict[int, list[ChoiceDelta]] = {}

    async def next(self) -> list[ChoiceDelta] | None:
        """Return the joined deltas of some choices, or None at the end."""
        ready: list[int] = []
        while not ready:
            if (batch := await self._next_batch()) is None:
                return None
            for delta in batch:
                self._held.setdefault(delta.index, []).append(delta)
            ready = [index for index, held in self._held.items() if index not in self._started or self._is_full(held)]
        self._started.update(ready)
        return [join_deltas(self._held.pop(index)) for index in ready]

    def _is_full(self, held: Sequence[ChoiceDelta]) -> bool:
        return held[-1].finish_reason is not None or sum(len(delta.token_ids) for delta in held) >= self._num_tokens


class ChoiceState:
    """Converts the events of one choice to deltas: parses its text into parts, and assigns ids to its tool calls.

    A token's log probabilities are released together with its text.
    """

    def __init__(
        self,
        index: int,
        text: ChoiceText,
        *,
        include_stop: bool,
        stop_token_ids: Sequence[int] = (),
        parser: Parser | None = None,
        choice_id: str = "",
    ) -> None:
        """Prepare the state of the choice at `index` of the answer.

        `stop_token_ids` are the request's, without the model's own. Without a parser all text is content. The ids of
        tool calls are derived from `choice_id`, which must be unique.
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
        self._choice_id = choice_id
        self._num_calls = 0
        self._num_contents = 0  # runs of content, separated by reasoning or calls
        self._last_is_content = False
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
            piece = text.push(token_id)
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
            self._write_parts(self._parser.finish(), delta)
        self.finish_reason = delta.finish_reason
        delta.positions = self._release()
        return delta

    def _add_text(self, text: str, delta: ChoiceDelta) -> None:
        self._num_chars += len(text)
        if self._parser is None:
            delta.write(AnswerPart(PartKind.CONTENT, text))
            return
        parts = self._parser.push(text)
        self._write_parts(parts, delta)
        # Without parts, the text may begin a tag if it is held, and else it is one, or line breaks next to one.
        if self._undecided and (parts or not self._parser.num_held):
            is_content = any(part.kind is PartKind.CONTENT for part in parts)
            self._decide(is_content, self._num_chars - self._parser.num_held)

    def _write_parts(self, parts: Sequence[AnswerPart], delta: ChoiceDelta) -> None:
        for part in parts:
            is_content = part.kind is PartKind.CONTENT
            self._num_contents += is_content and not self._last_is_content
            self._last_is_content = is_content
            match part.kind:
                case PartKind.CALL:
                    delta.write(ToolCallDelta(self._num_calls, self._call_id(), part.text, ""))
                    self._num_calls += 1
                case PartKind.ARGUMENTS:
                    delta.write(ToolCallDelta(self._num_calls - 1, "", "", part.text))
                case _:
                    delta.write(part)

    def _call_id(self) -> str:
        assert self._parser is not None
        digest = hashlib.sha256(f"{self._choice_id}-{self._num_calls}".encode()).hexdigest()
        length = self._parser.format.tool_format.id_length
        return f"call_{digest[:24]}" if length is None else digest[:length]

    def _decide(self, is_content: bool, end: int | None = None) -> None:
        """Record whether the undecided tokens that begin before character `end` are content, and which run of it."""
        decided = [position for position in self._undecided if end is None or position.offset < end]
        for position in decided:
            position.is_content, position.content_index = is_content, self._num_contents - 1
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
            self._write_parts(self._parser.finish(), delta)
            if self.finish_reason == FinishReason.STOP and self._parser.ends_with_calls:
                self.finish_reason = self._parser.format.calls_end
        delta.finish_reason = self.finish_reason
        delta.stop_string = delta.stop_reason = self._text.stopped
        if delta.stop_string is None and event.stop_token_id in self._stop_token_ids:
            delta.stop_reason = event.stop_token_id

    def _hold(self, token_id: int, logprobs: TokenLogprobs, offset: int) -> None:
        position = TokenPosition(token_id, logprobs, offset)
        self._held.append(position)
        if self._parser is not None:
            position.is_content = None
            self._undecided.append(position)

    def _release(self) -> list[TokenPosition]:
        """Return the tokens whose text is released; at the end all tokens except the tokens of a hidden stop string."""
        if self.finish_reason is not None and self._parser is not None:
            self._decide(self._last_is_content)
        if self.finish_reason is not None and not (self._text.stopped is not None and not self._include_stop):
            num_free = len(self._held)
        else:
            num_free = next((i for i, held in enumerate(self._held) if held.offset >= self._num_chars), len(self._held))
        free = self._held[:num_free]
        del self._held[:num_free]  # which costs nothing if there are none, though very many may be held
        return free
