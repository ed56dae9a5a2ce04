"""Detection of outputs that repeat themselves. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from engine.shared.messages import RepetitionDetection


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
