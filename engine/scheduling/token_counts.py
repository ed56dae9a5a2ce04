"""What is counted of the tokens of a request as they come: how often each occurs, and repetitions. Plain Python."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from engine.shared.messages import RepetitionDetection

IN_PROMPT, IN_OUTPUT = 1, 2  # what an occurrence adds to a code; IN_PROMPT is added once


class TokenCounts:
    """The different tokens of a text that grows, each with a code: IN_OUTPUT for each occurrence, plus IN_PROMPT."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.codes = array("i")
        self.num_counted = 0  # tokens
        self._indices: dict[int, int] = {}  # token id -> its index in both arrays

    def update(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Count the tokens of prompt and output that were appended since the last call."""
        if not self.num_counted:
            self._indices = {token_id: i for i, token_id in enumerate(dict.fromkeys(token_ids[:num_prompt_tokens]))}
            self.ids = array("i", self._indices)
            self.codes = array("i", [IN_PROMPT]) * len(self.ids)
            self.num_counted = num_prompt_tokens
        self._add(token_ids[self.num_counted :])
        self.num_counted = len(token_ids)

    def with_draft(self, draft_token_ids: Sequence[int]) -> TokenCounts:
        """Return the counts as if the draft were accepted."""
        if not draft_token_ids:
            return self
        counts = TokenCounts()
        counts.ids, counts.codes, counts._indices = self.ids[:], self.codes[:], dict(self._indices)
        counts._add(draft_token_ids)
        return counts

    def _add(self, output_token_ids: Iterable[int]) -> None:
        for token_id in output_token_ids:
            index = self._indices.setdefault(token_id, len(self.ids))
            if index == len(self.ids):
                self.ids.append(token_id)
                self.codes.append(0)
            self.codes[index] += IN_OUTPUT


class RepetitionDetector:
    """Detects `min_count` adjacent copies of a pattern at the end of an output.

    For each pattern size it counts how many of the last tokens equal the token one pattern earlier. The pattern is
    repeated once this count covers all copies but the first. A token costs one comparison per size, whatever the
    length of the output.
    """

    def __init__(self, params: RepetitionDetection, min_tokens: int) -> None:
        """`min_tokens`: length of the output below which no repetition is reported."""
        self._params = params
        self._min_tokens = min_tokens
        self._sizes = range(params.min_pattern_size, params.max_pattern_size + 1)
        self.num_equal = [0] * len(self._sizes)  # replaced by `push`, never changed

    def push(self, token_ids: Sequence[int], num_output_tokens: int) -> bool:
        """Process the last of `token_ids`, and return whether it completes a repetition.

        `token_ids` ends with `num_output_tokens` tokens of output. Must be called exactly once for each of them.
        """
        last = token_ids[-1]
        self.num_equal = [
            num_equal + 1 if size < num_output_tokens and token_ids[-1 - size] == last else 0
            for size, num_equal in zip(self._sizes, self.num_equal, strict=True)
        ]
        repeats = self._params.min_count - 1
        found = any(num >= size * repeats for size, num in zip(self._sizes, self.num_equal, strict=True))
        return found and num_output_tokens >= self._min_tokens
