"""Writes completions: whole answers and streams of chunks, with OpenAI's legacy form of log probabilities."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from server.api.completions.echo import PromptEchoes
from server.api.completions.schemas import Completion, CompletionChoice, CompletionLogprobs
from server.generation.choice import ChoiceDelta, TokenPosition, json_logprob
from server.generation.endpoint import AnswerMetadata
from server.generation.event_writer import ChunkWriter
from server.generation.token_fields import NO_FIELDS, TokenFields
from server.schemas.answers import RequestTimings, Usage, encoded
from server.schemas.request_fields import StreamOptions
from server.text.parsers.answer_parts import AnswerPart
from server.text.tokenizer import Tokenizer


class CompletionWriter(ChunkWriter):
    """Writes the answer or the stream of one completion request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        metadata: AnswerMetadata,
        echoes: PromptEchoes | None,
        options: StreamOptions | None = None,
        *,
        with_logprobs: bool,
        fields: TokenFields = NO_FIELDS,
    ) -> None:
        super().__init__(options)
        self._tokenizer = tokenizer
        self._envelope: dict[str, Any] = vars(metadata)
        self._fields = fields
        self._echoes = echoes
        self._with_logprobs = with_logprobs
        self._started: set[int] = set()  # indices of choices whose first chunk was written

    def chunks(self, delta: ChoiceDelta) -> list[Completion]:
        """Return up to two chunks: one with text, and one with the finish reason."""
        is_first = delta.index not in self._started
        if self._echoes is not None:
            delta = self._with_echo(self._echoes, delta, is_first=is_first)
        self._started.add(delta.index)
        choices = []
        text = "".join([part.text for part in delta.parts if isinstance(part, AnswerPart)])  # there are no others
        token_ids = UNSET if self._fields is NO_FIELDS else self._fields.token_ids(delta)
        if text or delta.positions or token_ids:
            logprobs = self._logprobs(delta.positions) if self._with_logprobs else None
            choices.append(CompletionChoice(text, delta.index, logprobs, None, token_ids=token_ids))
        if delta.finish_reason is not None:
            last = CompletionChoice("", delta.index, None, delta.finish_reason, stop_reason=delta.stop_reason)
            choices.append(last)
        if is_first and choices and self._fields is not NO_FIELDS:
            choices[0].prompt_token_ids = self._fields.prompt_token_ids(delta.index)
        return [Completion(**self._envelope, choices=[choice]) for choice in choices]

    def usage_chunk(self) -> Completion:
        return Completion(**self._envelope, choices=[])

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType = UNSET
    ) -> Completion:
        echoed = deltas
        if self._echoes is not None:
            echoed = [self._with_echo(self._echoes, delta, is_first=True) for delta in deltas]
        choices = [self._choice(delta) for delta in echoed]
        answer = Completion(**self._envelope, choices=choices, usage=usage, lightwell=timings)
        for choice, delta in zip(answer.choices, deltas, strict=True):
            choice.prompt_logprobs = self._fields.prompt_logprobs(self._tokenizer, delta.index)
            choice.prompt_token_ids = self._fields.prompt_token_ids(delta.index)
            choice.token_ids = self._fields.token_ids(delta)
            choice.stop_reason = delta.stop_reason
        return answer

    def _with_echo(self, echoes: PromptEchoes, delta: ChoiceDelta, *, is_first: bool) -> ChoiceDelta:
        echo = echoes.of_choice(delta.index)
        for position in delta.positions:
            position.offset += len(echo.text)
        if not is_first:
            return delta
        positions = echo.positions + delta.positions
        return replace(delta, parts=echo.parts + delta.parts, positions=positions)

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        logprobs = self._logprobs(delta.positions) if self._with_logprobs else None
        return CompletionChoice(delta.text, delta.index, logprobs, delta.finish_reason)

    def _logprobs(self, positions: Sequence[TokenPosition]) -> CompletionLogprobs:
        return CompletionLogprobs(
            text_offset=[position.offset for position in positions],
            token_logprobs=[
                None if position.logprobs is None else json_logprob(position.logprobs.logprob) for position in positions
            ],
            tokens=[self._fields.token_name(self._tokenizer, position.token_id) for position in positions],
            top_logprobs=[self._top_logprobs(position) for position in positions],
        )

    def _top_logprobs(self, position: TokenPosition) -> msgspec.Raw | None:
        """Return the log probabilities of the top tokens and of the token itself, by text.

        Of tokens with the same text the most likely one is kept.
        """
        if position.logprobs is None:
            return None
        top: dict[str, float] = {}
        logprobs = position.logprobs
        for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True):
            top.setdefault(self._fields.token_name(self._tokenizer, token_id), json_logprob(logprob))
        top.setdefault(self._fields.token_name(self._tokenizer, position.token_id), json_logprob(logprobs.logprob))
        return encoded(top)
