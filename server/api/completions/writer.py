"""What is special about `POST /v1/completions`: its prompts, echo, and the older form of log probabilities."""

from collections.abc import Sequence
from dataclasses import replace

from msgspec import UNSET, UnsetType

from engine.shared.messages import TokenLogprobs
from server.api.completions.schemas import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from server.constrained.constraints import Constraint, content_constraint
from server.context import ServerContext
from server.generation.choice_state import Delta, Position, json_logprob
from server.generation.endpoint import Head
from server.generation.event_writer import ChunkWriter
from server.generation.prompts import Prompt, encode_prompt
from server.generation.token_fields import NO_FIELDS, TokenFields
from server.schemas.common import Account, StreamOptions, Usage
from server.text.choice_text import ChoiceText
from server.text.parts import Part, PartKind
from server.text.tokenizer import Tokenizer


class CompletionEndpoint:
    noun = "prompt"
    id_prefix = "cmpl-"

    def encode(self, context: ServerContext, body: CompletionRequest) -> list[Prompt]:
        with_special = body.add_special_tokens is not False
        return [encode_prompt(context, value, add_special_tokens=with_special) for value in body.prompt]

    def constraint(self, context: ServerContext, body: CompletionRequest, prompt: Prompt) -> Constraint | None:
        return content_constraint(context, body)

    def writer(
        self, context: ServerContext, body: CompletionRequest, head: Head, prompts: Sequence[Prompt]
    ) -> "CompletionWriter":
        tokenizer, with_logprobs = context.tokenizer, body.logprobs is not None
        echoes = None
        if body.echo:
            echoes = _Echoes(tokenizer, prompts, num_choices=body.num_answered, num_top=body.logprobs)
        fields = TokenFields.asked_for(body, prompts)
        options = body.stream_options
        return CompletionWriter(tokenizer, head, echoes, options, with_logprobs=with_logprobs, fields=fields)


class _Echoes:
    """What the choices of each prompt begin with."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, num_choices: int, num_top: int | None
    ) -> None:
        """`num_choices` is of each prompt, `num_top` the alternatives of each token; None: no log probabilities."""
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._num_choices = num_choices
        self._num_top = num_top
        self._made: dict[int, Delta] = {}  # by prompt, for all its choices begin alike

    def of_choice(self, index: int) -> Delta:
        """To be asked for once the prompt's log probabilities are known, if they were asked for."""
        prompt_index = index // self._num_choices
        if prompt_index not in self._made:
            self._made[prompt_index] = self._make(self._prompts[prompt_index])
        return self._made[prompt_index]

    def _make(self, prompt: Prompt) -> Delta:
        spelled = ChoiceText(self._tokenizer, skip_special_tokens=False, track_offsets=self._num_top is not None)
        tokens_text = spelled.push(prompt.token_ids) + spelled.finish()
        text = tokens_text if prompt.text is None else prompt.text
        # A BOS token, and the space that sentencepiece puts first, are not in the client's text.
        num_added = len(tokens_text) - len(text) if tokens_text.endswith(text) else 0
        offsets = [max(0, offset - num_added) for offset in spelled.offsets]
        logprobs = [_with_top(entry, self._num_top or 0) for entry in prompt.logprobs]
        positions = list(map(Position, prompt.token_ids, [None, *logprobs], offsets))
        return Delta(0, [Part(PartKind.CONTENT, text)], positions)


def _with_top(logprobs: TokenLogprobs, num_top: int) -> TokenLogprobs:
    """`prompt_logprobs` may have asked for more alternatives."""
    if len(logprobs.top_token_ids) <= num_top:
        return logprobs
    top_token_ids, top_logprobs = logprobs.top_token_ids[:num_top], logprobs.top_logprobs[:num_top]
    return TokenLogprobs(logprobs.logprob, logprobs.rank, top_token_ids, top_logprobs)


class CompletionWriter(ChunkWriter):
    def __init__(
        self,
        tokenizer: Tokenizer,
        head: Head,
        echoes: _Echoes | None,
        options: StreamOptions | None = None,
        *,
        with_logprobs: bool,
        fields: TokenFields = NO_FIELDS,
    ) -> None:
        super().__init__(options)
        self._tokenizer = tokenizer
        self._head = head
        self._fields = fields
        self._echoes = echoes
        self._with_logprobs = with_logprobs
        self._started: set[int] = set()  # choices that the stream has begun

    def chunks(self, delta: Delta) -> list[Completion]:
        """At most one with text, and one that says why the choice ended."""
        begins = delta.index not in self._started
        delta = self._after_echo(delta, begins=begins)
        self._started.add(delta.index)
        choices = []
        if delta.text or delta.positions or self._fields.token_ids(delta):
            choices.append(self._choice(delta, self._logprobs(delta.positions), None))
            choices[0].token_ids = self._fields.token_ids(delta)
        if delta.finish_reason is not None:
            choices.append(self._choice(Delta(delta.index), None, delta.finish_reason))
            choices[-1].stop_reason = delta.stop_reason
        if begins and choices:
            choices[0].prompt_token_ids = self._fields.prompt_token_ids(delta.index)
        return [self._completion([choice]) for choice in choices]

    def usage_chunk(self) -> Completion:
        return self._completion([])

    def answer(self, deltas: Sequence[Delta], usage: Usage, account: Account | UnsetType = UNSET) -> Completion:
        placed = [self._after_echo(delta, begins=True) for delta in deltas]
        answer = self._completion([self._choice(d, self._logprobs(d.positions), d.finish_reason) for d in placed])
        answer.usage = usage
        answer.lightwell = account
        for choice, delta in zip(answer.choices, deltas, strict=True):
            choice.prompt_logprobs = self._fields.prompt_logprobs(self._tokenizer, delta.index)
            choice.prompt_token_ids = self._fields.prompt_token_ids(delta.index)
            choice.token_ids = self._fields.token_ids(delta)
            choice.stop_reason = delta.stop_reason
        return answer

    def _after_echo(self, delta: Delta, *, begins: bool) -> Delta:
        if self._echoes is None:
            return delta
        echo = self._echoes.of_choice(delta.index)
        for position in delta.positions:
            position.offset += len(echo.text)
        if not begins:
            return delta
        positions = echo.positions + delta.positions
        return replace(delta, parts=echo.parts + delta.parts, positions=positions)

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        head = self._head
        return Completion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=choices,
            system_fingerprint=head.system_fingerprint,
        )

    def _choice(self, delta: Delta, logprobs: CompletionLogprobs | None, finish_reason: str | None) -> CompletionChoice:
        return CompletionChoice(delta.text, delta.index, logprobs, finish_reason)

    def _logprobs(self, positions: Sequence[Position]) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        return CompletionLogprobs(
            text_offset=[position.offset for position in positions],
            token_logprobs=[
                None if position.logprobs is None else json_logprob(position.logprobs.logprob) for position in positions
            ],
            tokens=[self._fields.spell(self._tokenizer, position.token_id) for position in positions],
            top_logprobs=[self._top_logprobs(position) for position in positions],
        )

    def _top_logprobs(self, position: Position) -> dict[str, float] | None:
        """The alternatives, and the token itself where it is none of them; of tokens that read alike, the likelier."""
        if position.logprobs is None:
            return None
        top: dict[str, float] = {}
        logprobs = position.logprobs
        for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True):
            top.setdefault(self._fields.spell(self._tokenizer, token_id), json_logprob(logprob))
        top.setdefault(self._fields.spell(self._tokenizer, position.token_id), json_logprob(logprobs.logprob))
        return top
