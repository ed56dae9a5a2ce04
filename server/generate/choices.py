"""One choice of an answer: what its tokens add to the text, and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
class Delta:
    """What was added to a choice: a part of it in a stream, all of it otherwise."""

    index: int
    text: str
    positions: list[Position] = field(default_factory=list)  # empty unless asked for
    finish_reason: str | None = None  # stop, length
    token_ids: list[int] = field(default_factory=list)  # those that the usage counts

    def add(self, other: Delta) -> None:
        """What was added to the same choice after this."""
        self.text += other.text
        self.positions += other.positions
        self.token_ids += other.token_ids
        self.finish_reason = other.finish_reason


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
        return Delta(self.index, text, self._release(), self.finish_reason, event.token_ids[:num_new])

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
