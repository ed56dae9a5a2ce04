"""What vLLM adds to an answer: the ids of its tokens, and log probabilities of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from msgspec import UNSET, UnsetType

from engine.shared.messages import TokenLogprobs
from server.generation.choice_state import Delta, json_logprob
from server.generation.prompts import Prompt
from server.schemas.common import GenerationRequest, PromptLogprob
from server.text.choice_text import token_text
from server.text.tokenizer import Tokenizer

PromptLogprobs = list[dict[int, PromptLogprob] | None]


@dataclass(frozen=True, slots=True)
class TokenFields:
    """Each is UNSET unless the request asks for it. Choices are those of the answer."""

    prompts: Sequence[Prompt] = ()
    num_choices: int = 1  # of each prompt
    with_ids: bool = False
    as_ids: bool = False  # whether tokens with log probabilities are spelled as their ids
    num_top: int | None = None  # alternatives of each prompt token; None: no log probabilities

    @classmethod
    def asked_for(cls, body: GenerationRequest, prompts: Sequence[Prompt]) -> Self:
        return cls(
            prompts,
            body.num_answered,
            bool(body.return_token_ids),
            bool(body.return_tokens_as_token_ids),
            body.prompt_logprobs,
        )

    def spell(self, tokenizer: Tokenizer, token_id: int) -> str:
        """A token in a list of log probabilities."""
        return f"token_id:{token_id}" if self.as_ids else token_text(tokenizer, token_id)

    def token_ids(self, delta: Delta) -> list[int] | UnsetType:
        return delta.token_ids if self.with_ids else UNSET

    def prompt_token_ids(self, index: int) -> list[int] | UnsetType:
        """Of choice `index`."""
        return self._prompt(index).token_ids if self.with_ids else UNSET

    def prompt_logprobs(self, tokenizer: Tokenizer, index: int) -> PromptLogprobs | UnsetType:
        """Of choice `index`, to be asked for once they are known. The first token has none: it follows nothing."""
        if self.num_top is None:
            return UNSET
        prompt = self._prompt(index)
        known = zip(prompt.token_ids[1:], prompt.logprobs, strict=True)
        return [None, *(_alternatives(tokenizer, token_id, logprobs, self.num_top) for token_id, logprobs in known)]

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.num_choices]


def _alternatives(
    tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, num_top: int
) -> dict[int, PromptLogprob]:
    """The most likely tokens, and the prompt's own where it is none of them."""

    def entry(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(json_logprob(logprob), rank, token_text(tokenizer, token_id))

    top = zip(logprobs.top_token_ids[:num_top], logprobs.top_logprobs, strict=False)
    ranked = {token_id: entry(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, start=1)}
    return ranked | {token_id: entry(token_id, logprobs.logprob, logprobs.rank)}


NO_FIELDS = TokenFields()
