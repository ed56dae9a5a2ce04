"""Whether an output has begun to repeat itself, told token by token. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from engine.shared.messages import RepetitionDetection


class RepetitionDetector:
    """Counts for each size of a pattern how many tokens, up to the last, equal the one a pattern before them.

    An output ends with `min_count` copies of a pattern where as many tokens do as all copies but the first have. So a
    token costs one comparison for each size, however long the output and the copies are.
    """

    def __init__(self, params: RepetitionDetection, min_tokens: int) -> None:
        """Nothing counts as found before `min_tokens` of output."""
        self._params = params
        self._min_tokens = min_tokens
        self._sizes = range(params.min_pattern_size, params.max_pattern_size + 1)
        self._num_equal = [0] * len(self._sizes)

    def push(self, token_ids: Sequence[int], num_output_tokens: int) -> bool:
        """Take in the last of the tokens, of which `num_output_tokens` are output. Whether it completes a repetition.

        To be called once for each output token.
        """
        last, found = token_ids[-1], False
        for index, size in enumerate(self._sizes):
            is_equal = size < num_output_tokens and token_ids[-1 - size] == last
            self._num_equal[index] = self._num_equal[index] + 1 if is_equal else 0
            found = found or self._num_equal[index] >= size * (self._params.min_count - 1)
        return found and num_output_tokens >= self._min_tokens
