"""DRY ("don't repeat yourself", p-e-w 2024): the longer a repeat of earlier tokens, the less likely the token that
would make it longer. No torch.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.messages import SamplerChain
from engine.request import SampledRequest

MAX_REPEAT = 256  # tokens; a longer repeat counts as this long, so that a text of one word does not hold up the step
MAX_LOG = 88.72  # of a float32

IntArray = npt.NDArray[np.int32]


def repeat_penalties(request: SampledRequest, chain: SamplerChain) -> dict[int, float]:
    """Token id -> what is taken from its logit: multiplier * base ** (length of the repeat - allowed length).

    A repeat is a run of tokens at the end of the text that stands in it before, and the token is what followed there.
    It does not reach back beyond the last sequence breaker. A token that is a breaker by itself has no penalty.
    """
    ids = np.array(request.history(), dtype=np.int32)
    if request.draft_token_ids:
        ids = np.concatenate((ids, np.array(request.draft_token_ids, dtype=np.int32)))
    if chain.dry_penalty_last_n >= 0:
        ids = ids[max(0, len(ids) - chain.dry_penalty_last_n) :]
    followers, lengths = _repeats(ids, _longest(ids, chain))
    is_long = lengths >= chain.dry_allowed_length
    order = np.argsort(lengths[is_long])  # of a token that followed several repeats the longest comes last, and stays
    longest = dict(zip(followers[is_long][order].tolist(), lengths[is_long][order].tolist(), strict=True))
    single = chain.dry_breakers.get(1, frozenset())
    return {token_id: _penalty(length, chain) for token_id, length in longest.items() if (token_id,) not in single}


def _penalty(length: int, chain: SamplerChain) -> float:
    exponent = length - chain.dry_allowed_length
    if chain.dry_base > 1:
        exponent = min(exponent, int(MAX_LOG / math.log(chain.dry_base)))
    return float(chain.dry_multiplier * chain.dry_base**exponent)


def _longest(ids: IntArray, chain: SamplerChain) -> int:
    """How many tokens come after the last sequence breaker."""
    if not chain.dry_breakers:
        return MAX_REPEAT
    tail: list[int] = ids[-MAX_REPEAT - max(chain.dry_breakers) :].tolist()
    for num_after in range(min(MAX_REPEAT, len(tail))):
        end = len(tail) - num_after
        for length, breakers in chain.dry_breakers.items():
            if length <= end and tuple(tail[end - length : end]) in breakers:
                return num_after
    return MAX_REPEAT


def _repeats(ids: IntArray, longest: int) -> tuple[IntArray, IntArray]:
    """Of each place where the last tokens stand before: what follows there, and how many they are, up to `longest`."""
    last = len(ids) - 1
    if last < 1 or longest < 1:
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
    ends = np.flatnonzero(ids[:last] == ids[last])
    lengths = np.ones(len(ends), dtype=np.int32)
    alive = np.arange(len(ends))
    for distance in range(1, longest):
        alive = alive[ends[alive] >= distance]
        alive = alive[ids[ends[alive] - distance] == ids[last - distance]]
        if not len(alive):
            break
        lengths[alive] += 1
    return ids[ends + 1], lengths
