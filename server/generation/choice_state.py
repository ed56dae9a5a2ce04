"""One choice of an answer: what its tokens add to the text, and when it ends."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.text.choice_text import ChoiceText
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
    content_index: int = 0  # which content it is part of, for there may be calls between them; set at the same time


@dataclass(slots=True)
class ToolCallDelta:
    """What was added to a call of a tool. The first addition has the call's id and name."""

    index: int  # which call of its choice
    id: str  # "" after the first
    name: str  # "" after the first
    arguments: str  # a piece of the JSON text


Addition = Part | ToolCallDelta  # to a thought or to content, or to a call


@dataclass(slots=True)
class Delta:
    """What was added to a choice: a part of it in a stream, all of it otherwise."""

    index: int
    parts: list[Addition] = field(default_factory=list)  # in the order in which the model wrote them
    positions: list[Position] = field(default_factory=list)  # empty unless asked for
    finish_reason: str | None = None  # stop, length, tool_calls, abort
    stop_string: str | None = None  # the one that ended the text, if one did
    stop_token_id: int | None = None  # the same of the request's stop_token_ids
    token_ids: list[int] = field(default_factory=list)  # those that the usage counts

    @property
    def text(self) -> str:
        """The content: without reasoning and calls."""
        return self._text_of(PartKind.CONTENT)

    @property
    def reasoning(self) -> str:
        return self._text_of(PartKind.REASONING)

    def _text_of(self, kind: PartKind) -> str:
        return "".join([part.text for part in self.parts if isinstance(part, Part) and part.kind is kind])

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        """One for each call that was added to."""
        return [part for part in self.parts if isinstance(part, ToolCallDelta)]

    @property
    def stop_reason(self) -> str | int | None:
        """What of the request's own ended the choice."""
        return self.stop_token_id if self.stop_string is None else self.stop_string

    def write(self, part: Addition) -> None:
        """Adds what the model wrote next."""
        if not (self.parts and _goes_on(self.parts[-1], part)):
            self.parts.append(part)
            return
        last = self.parts[-1]
        if isinstance(last, Part):
            self.parts[-1] = Part(last.kind, last.text + _text(part))
        else:
            last.arguments += _text(part)

    def add(self, other: Delta) -> None:
        """What was added to the same choice after this."""
        for part in other.parts:
            self.write(part)
        self.positions += other.positions
        self.token_ids += other.token_ids
        self.finish_reason = other.finish_reason
        self.stop_string, self.stop_token_id = other.stop_string, other.stop_token_id


def _goes_on(last: Addition, part: Addition) -> bool:
    """Whether two additions that follow each other are to the same thing."""
    if isinstance(last, Part):
        return isinstance(part, Part) and last.kind is part.kind
    return isinstance(part, ToolCallDelta) and last.index == part.index


def _text(part: Addition) -> str:
    return part.text if isinstance(part, Part) else part.arguments


class Whole:
    """All additions to a choice as one. Their texts are joined once, for an answer may have very many."""

    def __init__(self, index: int) -> None:
        self._delta = Delta(index)
        self._texts: list[list[str]] = []  # of each part

    def add(self, delta: Delta) -> None:
        parts = self._delta.parts
        for part in delta.parts:
            if not (parts and _goes_on(parts[-1], part)):
                parts.append(part)
                self._texts.append([])
            self._texts[-1].append(_text(part))
        self._delta.positions += delta.positions
        self._delta.token_ids += delta.token_ids
        self._delta.finish_reason = delta.finish_reason
        self._delta.stop_string, self._delta.stop_token_id = delta.stop_string, delta.stop_token_id

    def join(self) -> Delta:
        joined = zip(self._delta.parts, map("".join, self._texts), strict=True)
        self._delta.parts = [
            Part(part.kind, text) if isinstance(part, Part) else replace(part, arguments=text) for part, text in joined
        ]
        return self._delta


class ChoiceParts:
    """Tells the parts of a choice's text apart, and gives its calls their ids."""

    def __init__(self, parser: OutputParser, choice_id: str) -> None:
        """`choice_id` is the choice's alone. The ids of its calls are derived from it."""
        self._parser = parser
        self._choice_id = choice_id
        self._num_calls = 0
        self.num_contents = 0  # with thoughts or calls between them
        self.last_is_content = False  # of what came so far

    @property
    def is_thinking(self) -> bool:
        return self._parser.is_thinking

    @property
    def finish_reason(self) -> str:
        """Of a choice whose model came to its end."""
        return self._parser.format.calls_end if self._parser.ends_with_calls else FinishReason.STOP.value

    @property
    def num_held(self) -> int:
        """Characters at the end of which it is not known yet what they are."""
        return self._parser.num_held

    def push(self, text: str, delta: Delta) -> bool | None:
        """Whether what was not known until now is content; None: it still is not known."""
        parts = self._parser.push(text)
        self._write_all(parts, delta)
        if not parts:
            return None if self._parser.is_holding else False  # a tag, or layout
        return any(part.kind is PartKind.CONTENT for part in parts)

    def finish(self, delta: Delta) -> None:
        self._write_all(self._parser.finish(), delta)

    def _write_all(self, parts: Sequence[Part], delta: Delta) -> None:
        for part in parts:
            self._write(part, delta)

    def _write(self, part: Part, delta: Delta) -> None:
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
        delta = Delta(self.index)
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
        delta = Delta(self.index, finish_reason=FinishReason.ABORT.value)
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
        if text and self._parts is None:
            delta.write(Part(PartKind.CONTENT, text))
        elif text and self._parts is not None:
            is_content = self._parts.push(text, delta)
            if is_content is not None and self._unknown:
                self._judge(is_content, self._num_chars - self._parts.num_held)

    def _judge(self, is_content: bool, end: int | None = None) -> None:
        """Says of the tokens that begin before the character `end` whether they are content, and which."""
        assert self._parts is not None
        known = [position for position in self._unknown if end is None or position.offset < end]
        for position in known:
            position.is_content, position.content_index = is_content, self._parts.num_contents - 1
        del self._unknown[: len(known)]

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
