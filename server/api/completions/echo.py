"""Puts the prompt before a completion, for requests with `echo`."""

from collections.abc import Sequence

from server.generation.choice import ChoiceDelta, TokenPosition
from server.generation.prompts import Prompt
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.tokenizer import Tokenizer


class PromptEchoes:
    """The prompts as the start of their choices, for requests with `echo`."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, num_choices: int, num_top: int | None
    ) -> None:
        """`num_choices` is per prompt. `num_top` is the number of alternatives per token; None: no logprobs."""
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._num_choices = num_choices
        self._num_top = num_top
        self._echoes: dict[int, ChoiceDelta] = {}  # by prompt index; shared by its choices

    def of_choice(self, index: int) -> ChoiceDelta:
        """Return the echo of choice `index`. The prompt must have its log probabilities by now, if requested."""
        prompt_index = index // self._num_choices
        if prompt_index not in self._echoes:
            self._echoes[prompt_index] = self._make(self._prompts[prompt_index])
        return self._echoes[prompt_index]

    def _make(self, prompt: Prompt) -> ChoiceDelta:
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
