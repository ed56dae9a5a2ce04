"""One choice of an answer: what its tokens add to the text, and when it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.messages import FinishReason, TokenEvent, TokenLogprobs
from server.text.choice import ChoiceText

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's word for "very unlikely"


def json_logprob(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass(slots=True)
class Position:
    """A token of an answer, where its log probabilities were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None  # None: a prompt's first token, which follows nothing
    offset: int  # characters of the choice's text before the token


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

    def add(self, other: Delta) -> None:
        """What was added to the same choice after this."""
        self.text += other.text
        self.reasoning += other.reasoning
        self.positions += other.positions
        self.finish_reason = other.finish_reason
        self.stop_string = other.stop_string
        for call in other.tool_calls:
            if self.tool_calls and self.tool_calls[-1].index == call.index:
                self.tool_calls[-1].arguments += call.arguments
            else:
                self.tool_calls.append(call)


class ChoiceState:
    """Takes in the events of one choice. A token's log probabilities are released together with its text."""

    def __init__(self, index: int, text: ChoiceText, *, include_stop: bool) -> None:
        self.index = index
        self.num_tokens = 0  # up to the end of the text, a stop string and an end token included
        self.finish_reason: str | None = None
        self.seconds = 0.0  # spent on text
        self._text = text
        self._include_stop = include_stop
        self._num_chars = 0  # released
        self._held: list[Position] = []

    def push(self, event: TokenEvent) -> Delta:
        """`event` must not be an error, nor follow the end."""
        assert self.finish_reason is None
        start = time.perf_counter()
        num_seen = self._text.num_tokens
        hides_last = event.stop_token_id is not None and not self._include_stop
        text = self._text.push(event.token_ids[:-1] if hides_last else event.token_ids)
        ends_by_token = event.finish_reason is not None and self._text.stopped is None
        if ends_by_token:
            text += self._text.finish()
        self._num_chars += len(text)
        num_new = self._text.num_tokens - num_seen + (hides_last and self._text.stopped is None)
        self.num_tokens += num_new
        if event.logprobs is not None:
            self._hold(event.token_ids[:num_new], event.logprobs, num_seen)
        self.finish_reason = self._end(event)
        self.seconds += time.perf_counter() - start
        return Delta(self.index, text, self._release(), self.finish_reason, stop_string=self._text.stopped)

    def abort(self) -> Delta:
        """Ends the choice as it stands, before the model has."""
        text = self._text.finish()
        self._num_chars += len(text)
        self.finish_reason = FinishReason.ABORT.value
        return Delta(self.index, text, self._release(), self.finish_reason)

    @property
    def stopped_by_text(self) -> bool:
        return self._text.stopped is not None

    def _end(self, event: TokenEvent) -> str | None:
        if self._text.stopped is not None:
            return FinishReason.STOP.value
        return None if event.finish_reason is None else event.finish_reason.value

    def _hold(self, token_ids: list[int], logprobs: list[TokenLogprobs], num_seen: int) -> None:
        offsets = self._text.offsets[num_seen:]
        offsets += [self._num_chars] * (len(token_ids) - len(offsets))  # an end token that is not in the text
        self._held += map(Position, token_ids, logprobs, offsets)

    def _release(self) -> list[Position]:
        """At the end all that is held, but for the tokens of a stop string that is not in the text."""
        if self.finish_reason is not None and not (self.stopped_by_text and not self._include_stop):
            num_free = len(self._held)
        else:
            num_free = next((i for i, held in enumerate(self._held) if held.offset >= self._num_chars), len(self._held))
        free, self._held = self._held[:num_free], self._held[num_free:]
        return free
