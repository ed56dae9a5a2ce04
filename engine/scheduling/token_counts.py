"""How often each token occurs in a request, for penalties. Plain Python."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

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
