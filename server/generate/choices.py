"""One choice of an answer: what its tokens add to the text, and when it ends."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.messages import FinishReason, TokenEvent, TokenLogprobs
from server.text.choice import ChoiceText
from server.text.output_parser import OutputParser
from server.text.parts import Part, PartKind

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's word for "very unlikely"


def json_logprob(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass(slots=True)
class Position:
    """A token of an answer, where its log probabilities were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None  # None: a prompt's first token, which follows nothing
    offset: int  # characters of the choice's text before the token
    is_content: bool | None = True  # None: not known yet, as where "<" may begin a tag; it is set once it is


@dataclass(slots=True)
class ToolCallDelta:
    """What was added to a call of a tool. The first addition has the call's id and name."""

    index: int  # which call of its choice
    id: str  # "" after the first
    name: str  # "" after the first
    arguments: str  # a piece of the JSON text


@dataclass(slots=True)
class Delta:
    """What was added to a choice: a part of it in a stream, all of it otherwise."""

    index: int
    text: str  # the content: without reasoning and calls
    positions: list[Position] = field(default_factory=list)  # empty unless asked for
    finish_reason: str | None = None  # stop, length, tool_calls, abort
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)  # one for each call that was added to, in order
    stop_string: str | None = None  # the one that ended the text, if one did
    stop_token_id: int | None = None  # the same of the request's stop_token_ids
    token_ids: list[int] = field(default_factory=list)  # those that the usage counts

    @property
    def stop_reason(self) -> str | int | None:
        """What of the request's own ended the choice."""
        return self.stop_token_id if self.stop_string is None else self.stop_string

    def add(self, other: Delta) -> None:
        """What was added to the same choice after this."""
        self.text += other.text
        self.reasoning += other.reasoning
        self.positions += other.positions
        self.token_ids += other.token_ids
        self.finish_reason = other.finish_reason
        self.stop_string, self.stop_token_id = other.stop_string, other.stop_token_id
        for call in other.tool_calls:
            if self.tool_calls and self.tool_calls[-1].index == call.index:
                self.tool_calls[-1].arguments += call.arguments
            else:
                self.tool_calls.append(call)


class Whole:
    """All additions to a choice as one. Their texts are joined once, for an answer may have very many."""

    def __init__(self, index: int) -> None:
        self._delta = Delta(index, "")
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._arguments: list[list[str]] = []  # of each call

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._delta.positions += delta.positions
        self._delta.token_ids += delta.token_ids
        self._delta.finish_reason = delta.finish_reason
        self._delta.stop_string, self._delta.stop_token_id = delta.stop_string, delta.stop_token_id
        for call in delta.tool_calls:
            if call.index == len(self._arguments):
                self._delta.tool_calls.append(call)
                self._arguments.append([])
            self._arguments[call.index].append(call.arguments)

    def join(self) -> Delta:
        self._delta.text = "".join(self._texts)
        self._delta.reasoning = "".join(self._reasoning)
        for call, pieces in zip(self._delta.tool_calls, self._arguments, strict=True):
            call.arguments = "".join(pieces)
        return self._delta


class ChoiceParts:
    """Tells the parts of a choice's text apart, and gives its calls their ids."""

    def __init__(self, parser: OutputParser, choice_id: str) -> None:
        """`choice_id` is the choice's alone. The ids of its calls are derived from it."""
        self._parser = parser
        self._choice_id = choice_id
        self._num_calls = 0
        self.last_is_content = False  # of what came so far

    @property
    def is_thinking(self) -> bool:
        return self._parser.is_thinking

    @property
    def finish_reason(self) -> str:
        """Of a choice whose model came to its end."""
        return self._parser.format.calls_end if self._parser.ends_with_calls else FinishReason.STOP.value

    def push(self, text: str, delta: Delta) -> bool | None:
        """Whether what was not known until now is content; None: it still is not known."""
        return self._write_all(self._parser.push(text), delta)

    def finish(self, delta: Delta) -> None:
        self._write_all(self._parser.finish(), delta)

    def _write_all(self, parts: Sequence[Part], delta: Delta) -> bool | None:
        for part in parts:
            self._write(part, delta)
        if not parts:
            return None if self._parser.is_holding else False  # a tag, or layout
        self.last_is_content = parts[-1].kind is PartKind.CONTENT
        return any(part.kind is PartKind.CONTENT for part in parts)

    def _write(self, part: Part, delta: Delta) -> None:
        match part.kind:
            case PartKind.REASONING:
                delta.reasoning += part.text
            case PartKind.CONTENT:
                delta.text += part.text
            case PartKind.CALL:
                delta.tool_calls.append(ToolCallDelta(self._num_calls, self._call_id(), part.text, ""))
                self._num_calls += 1
            case PartKind.ARGUMENTS if delta.tool_calls:
                delta.tool_calls[-1].arguments += part.text
            case PartKind.ARGUMENTS:
                delta.tool_calls.append(ToolCallDelta(self._num_calls - 1, "", "", part.text))

    def _call_id(self) -> str:
        digest = hashlib.sha256(f"{self._choice_id}-{self._num_calls}".encode()).hexdigest()
        length = self._parser.format.tool_format.id_length
        return f"call_{digest[:24]}" if length is None else digest[:length]


def best_choices(wholes: Sequence[Delta], num_choices: int, num_best: int) -> Sequence[Delta]:
    """Of each prompt's `num_choices` those whose tokens have the highest mean log probability, best first, renumbered.

    All of them as they are if there is nothing to choose.
    """
    if num_best == num_choices:
        return wholes
    best: list[Delta] = []
    for first in range(0, len(wholes), num_choices):
        ranked = sorted(wholes[first : first + num_choices], key=_mean_logprob, reverse=True)
        best += ranked[:num_best]
    return [replace(delta, index=index) for index, delta in enumerate(best)]


def _mean_logprob(delta: Delta) -> float:
    logprobs = [position.logprobs.logprob for position in delta.positions if position.logprobs is not None]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


class ChoiceState:
    """Takes in the events of one choice. A token's log probabilities are released together with its text."""

    def __init__(
        self,
        index: int,
        text: ChoiceText,
        *,
        include_stop: bool,
        stop_token_ids: Sequence[int] = (),
        parts: ChoiceParts | None = None,
    ) -> None:
        """`stop_token_ids` are the request's, beside the model's own. Without `parts` all text is content."""
        self.index = index
        self.num_tokens = 0  # up to the end of the text, a stop string and an end token included
        self.num_reasoning_tokens = 0  # those among them after which the model was still thinking
        self.finish_reason: str | None = None
        self.seconds = 0.0  # spent on text
        self._text = text
        self._include_stop = include_stop
        self._stop_token_ids = frozenset(stop_token_ids)
        self._parts = parts
        self._num_chars = 0  # of the text, released
        self._held: list[Position] = []
        self._unknown: list[Position] = []  # of which it is not known whether they are content

    def push(self, event: TokenEvent) -> Delta:
        """`event` must not be an error, nor follow the end."""
        assert self.finish_reason is None
        start = time.perf_counter()
        num_seen = self._text.num_tokens
        hides_last = event.stop_token_id is not None and not self._include_stop
        delta = Delta(self.index, "")
        for number, token_id in enumerate(event.token_ids[:-1] if hides_last else event.token_ids):
            text = self._text.push((token_id,))
            if event.logprobs is not None:
                self._hold(token_id, event.logprobs[number], self._text.offsets[-1])
            self._add_text(text, delta)
            self.num_reasoning_tokens += self._parts is not None and self._parts.is_thinking
            if self._text.stopped is not None:
                break
        ends_hidden = hides_last and self._text.stopped is None
        self._end(event, delta)
        if ends_hidden and event.logprobs is not None:
            self._hold(event.token_ids[-1], event.logprobs[-1], self._num_chars)
        num_new = self._text.num_tokens - num_seen + ends_hidden
        self.num_tokens += num_new
        delta.positions = self._release()
        delta.token_ids = event.token_ids[:num_new]
        self.seconds += time.perf_counter() - start
        return delta

    def abort(self) -> Delta:
        """Ends the choice as it stands, before the model has."""
        delta = Delta(self.index, "", finish_reason=FinishReason.ABORT.value)
        self._add_text(self._text.finish(), delta)
        if self._parts is not None:
            self._parts.finish(delta)
        self.finish_reason = delta.finish_reason
        delta.positions = self._release()
        return delta

    @property
    def stopped_by_text(self) -> bool:
        return self._text.stopped is not None

    def _add_text(self, text: str, delta: Delta) -> None:
        self._num_chars += len(text)
        if self._parts is None:
            delta.text += text
        elif text:
            self._judge(self._parts.push(text, delta))

    def _judge(self, is_content: bool | None) -> None:
        """Says of the tokens whether they are content, as soon as it is known."""
        if is_content is not None:
            for position in self._unknown:
                position.is_content = is_content
            self._unknown.clear()

    def _end(self, event: TokenEvent, delta: Delta) -> None:
        """The rest of the text and the finish reason, if the choice ends here."""
        if self._text.stopped is not None:
            self.finish_reason = FinishReason.STOP.value
        elif event.finish_reason is not None:
            self._add_text(self._text.finish(), delta)
            self.finish_reason = event.finish_reason.value
        if self.finish_reason is not None and self._parts is not None:
            self._parts.finish(delta)
            if self.finish_reason == FinishReason.STOP:
                self.finish_reason = self._parts.finish_reason
        delta.finish_reason = self.finish_reason
        delta.stop_string = self._text.stopped
        if delta.stop_string is None and event.stop_token_id in self._stop_token_ids:
            delta.stop_token_id = event.stop_token_id

    def _hold(self, token_id: int, logprobs: TokenLogprobs, offset: int) -> None:
        position = Position(token_id, logprobs, offset)
        self._held.append(position)
        if self._parts is not None:
            position.is_content = None
            self._unknown.append(position)

    def _release(self) -> list[Position]:
        """At the end all that is held, but for the tokens of a stop string that is not in the text."""
        if self.finish_reason is not None and self._parts is not None:
            self._judge(self._parts.last_is_content)
        if self.finish_reason is not None and not (self.stopped_by_text and not self._include_stop):
            num_free = len(self._held)
        else:
            num_free = next((i for i, held in enumerate(self._held) if held.offset >= self._num_chars), len(self._held))
        free, self._held = self._held[:num_free], self._held[num_free:]
        return free
