"""Writes completions: whole answers and streams of chunks, with OpenAI's legacy form of log probabilities.

The chunks of a stream have the form of the answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.api.completions.schemas import CompletionRequest
from server.generation.choice import ChoiceDelta, TokenPosition, json_logprob
from server.generation.endpoint import NO_FIELDS, AnswerMetadata, ChunkWriter
from server.generation.prompts import Prompt
from server.schemas.answers import PromptLogprobs, RequestTimings, Usage, encoded
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.tokenizer import Tokenizer


class CompletionLogprobs(msgspec.Struct):
    """Four lists with an entry per token. With echo the entry of the first prompt token is null."""

    text_offset: list[int] = []  # characters of the choice's text before the token
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | msgspec.Raw | None] = []


class CompletionChoice(msgspec.Struct):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: str | None  # null only in chunks of a stream
    stop_reason: str | int | UnsetType | None = UNSET  # the stop string or stop token id that ended the text
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # in a stream only in the first chunk of a choice
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A whole answer, or a chunk of a stream. Chunks have `usage` only if requested."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    lightwell: RequestTimings | UnsetType = UNSET


class CompletionWriter(ChunkWriter):
    """Writes the answer or the stream of one completion request."""

    def __init__(
        self, tokenizer: Tokenizer, metadata: AnswerMetadata, body: CompletionRequest, prompts: Sequence[Prompt]
    ) -> None:
        super().__init__(tokenizer, metadata, body, prompts)
        self._prompts = prompts
        self._num_choices = body.n or 1  # per prompt
        self._num_top = body.logprobs  # alternatives per token; None: no log probabilities
        self._echoes: dict[int, ChoiceDelta] | None = {} if body.echo else None  # by prompt; shared by its choices

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
            logprobs = None if self._num_top is None else self._logprobs(delta.positions)
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
        choices = [self._choice(delta) for delta in deltas]
        return Completion(**self._envelope, choices=choices, usage=usage, lightwell=timings)

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        fields, index = self._fields, delta.index
        if self._echoes is not None:
            delta = self._with_echo(self._echoes, delta, is_first=True)
        return CompletionChoice(
            delta.text,
            index,
            None if self._num_top is None else self._logprobs(delta.positions),
            delta.finish_reason,
            delta.stop_reason,
            fields.prompt_logprobs(self._tokenizer, index),
            fields.prompt_token_ids(index),
            fields.token_ids(delta),
        )

    def _with_echo(self, echoes: dict[int, ChoiceDelta], delta: ChoiceDelta, *, is_first: bool) -> ChoiceDelta:
        """Return the output with the prompt before it. The prompt must have its log probabilities, if requested."""
        index = delta.index // self._num_choices
        echo = echoes[index] if index in echoes else echoes.setdefault(index, self._echo(self._prompts[index]))
        for position in delta.positions:
            position.offset += len(echo.text)
        if not is_first:
            return delta
        return replace(delta, parts=echo.parts + delta.parts, positions=echo.positions + delta.positions)

    def _echo(self, prompt: Prompt) -> ChoiceDelta:
        """Return the prompt as the start of a choice."""
        decoder = ChoiceText(self._tokenizer, skip_special_tokens=False, track_offsets=self._num_top is not None)
        tokens_text = "".join(map(decoder.push, prompt.token_ids)) + decoder.finish()
        text = tokens_text if prompt.text is None else prompt.text
        # The BOS token and the leading space that sentencepiece adds are not in the client's text.
        num_added = len(tokens_text) - len(text) if tokens_text.endswith(text) else 0
        offsets = [max(0, offset - num_added) for offset in decoder.offsets]
        # `prompt_logprobs` may have requested more of them.
        logprobs = [entry.keep_top(self._num_top or 0) for entry in prompt.logprobs]
        positions = list(map(TokenPosition, prompt.token_ids, [None, *logprobs], offsets))
        return ChoiceDelta(0, [AnswerPart(PartKind.CONTENT, text)], positions)

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
