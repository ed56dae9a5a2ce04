"""The output of a choice, in pieces or as a whole, as the APIs' writers receive it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from engine.shared.messages import TokenLogprobs
from server.http.strict_json import MAX_DEPTH, is_deeper
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

    @property
    def decoded_arguments(self) -> dict[str, Any]:
        """The arguments of a whole call as an object.

        Other text, as of a call that was cut off, is wrapped in one, and so is what is nested too deep for a request.
        """
        try:
            value = msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            value = None
        is_usable = isinstance(value, dict) and not is_deeper(value, MAX_DEPTH)
        return value if is_usable else {"arguments": self.arguments}


DeltaPart = AnswerPart | ToolCallDelta


@dataclass(slots=True)
class ChoiceDelta:
    """New output of a choice: a piece of it in a stream, otherwise all of it."""

    index: int
    parts: list[DeltaPart] = field(default_factory=list)  # in the order in which the model wrote them
    positions: list[TokenPosition] = field(default_factory=list)  # empty unless log probabilities are requested
    finish_reason: str | None = None  # stop, length, tool_calls, repetition or abort
    stop_string: str | None = None  # the stop string that ended the text, if one did
    stop_token_id: int | None = None  # the one of the request's stop_token_ids that ended it, if one did
    token_ids: list[int] = field(default_factory=list)  # the tokens that the usage counts
    num_bytes: int = 0  # of its events, as an `AnswerShare` counts them

    @property
    def text(self) -> str:
        """The content, without reasoning and tool calls."""
        parts = self.parts
        return "".join([each.text for each in parts if isinstance(each, AnswerPart) and each.kind is PartKind.CONTENT])

    @property
    def reasoning(self) -> str:
        parts = self.parts
        return "".join(
            [each.text for each in parts if isinstance(each, AnswerPart) and each.kind is PartKind.REASONING]
        )

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        """The deltas of tool calls, at most one for each call."""
        return [part for part in self.parts if isinstance(part, ToolCallDelta)]

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or stop token id of the request that ended the choice, if one did."""
        return self.stop_token_id if self.stop_string is None else self.stop_string

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

    @property
    def num_tokens(self) -> int:
        return len(self._delta.token_ids)

    @property
    def has_ended(self) -> bool:
        """True if the last delta is that of the choice."""
        return self._delta.finish_reason is not None

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
        self._delta.stop_string, self._delta.stop_token_id = delta.stop_string, delta.stop_token_id

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
        self._held: dict[int, ChoiceAccumulator] = {}

    async def next(self) -> list[ChoiceDelta] | None:
        """Return the joined deltas of some choices, or None at the end."""
        ready: list[int] = []
        while not ready:
            if (batch := await self._next_batch()) is None:
                return None
            for delta in batch:
                self._held.setdefault(delta.index, ChoiceAccumulator(delta.index)).add(delta)
            ready = [
                index
                for index, joined in self._held.items()
                if index not in self._started or joined.num_tokens >= self._num_tokens or joined.has_ended
            ]
        self._started.update(ready)
        return [self._held.pop(index).join() for index in ready]
