"""vLLM's optional fields of an answer: token ids, and log probabilities of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from engine.shared.messages import TokenLogprobs
from server.generation.choice import ChoiceDelta, json_logprob
from server.generation.prompts import Prompt
from server.schemas.answers import PromptLogprob, PromptLogprobs, encoded
from server.schemas.generation_request import GenerationRequest
from server.text.choice_text import token_text
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenFields:
    """Computes the optional fields. Each is UNSET unless requested."""

    prompts: Sequence[Prompt] = ()
    num_choices: int = 1  # in the answer, per prompt
    with_ids: bool = False
    as_ids: bool = False  # name tokens with log probabilities by id
    num_top: int | None = None  # alternatives of each prompt token; None: no log probabilities

    def token_name(self, tokenizer: Tokenizer, token_id: int) -> str:
        """Return how a token is written in log probabilities: its text, or `token_id:N` if requested."""
        return f"token_id:{token_id}" if self.as_ids else token_text(tokenizer, token_id)

    def token_ids(self, delta: ChoiceDelta) -> list[int] | UnsetType:
        return delta.token_ids if self.with_ids else UNSET

    def prompt_token_ids(self, index: int) -> list[int] | UnsetType:
        """Return the token ids of the prompt of the choice at `index`."""
        return self._prompt(index).token_ids if self.with_ids else UNSET

    def prompt_logprobs(self, tokenizer: Tokenizer, index: int) -> PromptLogprobs | UnsetType:
        """Return the log probabilities of the prompt of the choice at `index`, with None for the first token.

        Only called once the engine has computed them.
        """
        if self.num_top is None:
            return UNSET
        prompt = self._prompt(index)
        entries = zip(prompt.token_ids[1:], prompt.logprobs, strict=True)
        alternatives = (_alternatives(tokenizer, token_id, logprobs, self.num_top) for token_id, logprobs in entries)
        return [None, *map(encoded, alternatives)]

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.num_choices]


def _alternatives(
    tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, num_top: int
) -> dict[int, PromptLogprob]:
    """Return the most likely tokens, and the prompt's own token if it is not one of them."""

    def entry(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(json_logprob(logprob), rank, token_text(tokenizer, token_id))

    logprobs = logprobs.keep_top(num_top)
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    ranked = {token_id: entry(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, start=1)}
    return ranked | {token_id: entry(token_id, logprobs.logprob, logprobs.rank)}


NO_FIELDS = TokenFields()
REQUEST_FIELDS = frozenset({"return_token_ids", "return_tokens_as_token_ids", "prompt_logprobs"})


def token_fields(body: GenerationRequest, prompts: Sequence[Prompt]) -> TokenFields:
    """Return the optional fields that a request asks for: it has one of REQUEST_FIELDS."""
    return TokenFields(
        prompts,
        body.requested().num_returned_choices,
        bool(body.return_token_ids),
        bool(body.return_tokens_as_token_ids),
        body.prompt_logprobs,
    )
