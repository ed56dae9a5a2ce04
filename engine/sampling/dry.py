"""DRY ("don't repeat yourself", p-e-w 2024): the longer a repeat of earlier tokens, the less likely the token that
would make it longer. No torch.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.scheduling.request import SampledRequest
from engine.shared.messages import SamplerChain

MAX_REPEAT = 256  # tokens; a longer repeat counts as this long, so that a text of one word does not hold up the step
MAX_LOG = 69.0  # of a penalty
MAX_PENALTY = 1e30  # stays finite in float32, also when it is divided by the lowest temperature

IntArray = npt.NDArray[np.int32]


def repeat_penalties(request: SampledRequest, chain: SamplerChain) -> dict[int, float]:
    """Token id -> what is taken from its logit: multiplier * base ** (length of the repeat - allowed length).

    A repeat is a run of tokens at the end of the text that stands in it before, and the token is what followed there.
    It does not reach back beyond the last sequence breaker. A token that is a breaker by itself has no penalty.
    """
    ids = np.array([*request.history(), *request.draft_token_ids], dtype=np.int32)
    first = max(0, len(ids) - chain.dry_penalty_last_n) if chain.dry_penalty_last_n >= 0 else 0
    window = ids[first:]
    lengths = _repeat_lengths(request, ids)[first:]
    lengths = np.minimum(lengths, np.minimum(np.arange(1, len(lengths) + 1), _longest(window, chain)))
    followers = window[1:]
    is_long = lengths >= max(1, chain.dry_allowed_length)
    order = np.argsort(lengths[is_long])  # of a token that followed several repeats the longest comes last, and stays
    longest = dict(zip(followers[is_long][order].tolist(), lengths[is_long][order].tolist(), strict=True))
    single = chain.dry_breakers.get(1, frozenset())
    return {token_id: _penalty(length, chain) for token_id, length in longest.items() if (token_id,) not in single}


def _penalty(length: int, chain: SamplerChain) -> float:
    exponent = length - chain.dry_allowed_length
    if chain.dry_base > 1:
        exponent = min(exponent, int(MAX_LOG / math.log(chain.dry_base)))
    return min(chain.dry_multiplier * chain.dry_base**exponent, MAX_PENALTY)


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


def _repeat_lengths(request: SampledRequest, ids: IntArray) -> IntArray:
    """Of each place but the last: how many tokens up to it are those at the end, up to `MAX_REPEAT`.

    What is known of the text without its last tokens says it of the text with them. So a request keeps the lengths of
    its own tokens, and what a draft adds is not kept.
    """
    num_known = len(ids) - len(request.draft_token_ids)
    known = request.repeat_lengths
    if known is None or not 0 < len(known) < num_known:
        known = _scan(ids[:num_known])
    known = request.repeat_lengths = _extend(known, ids[:num_known])
    return _extend(known, ids)


def _extend(lengths: IntArray, ids: IntArray) -> IntArray:
    """The lengths of all of `ids`, from those of their beginning."""
    for last in range(len(lengths) + 1, len(ids)):
        longer = np.minimum(np.concatenate((np.zeros(1, dtype=np.int32), lengths)) + 1, MAX_REPEAT)
        lengths = np.where(ids[:last] == ids[last], longer, 0).astype(np.int32)
    return lengths


def _scan(ids: IntArray) -> IntArray:
    """The lengths of a text of which nothing is known: one pass over the places that are left for each length."""
    last = len(ids) - 1
    lengths = np.zeros(max(0, last), dtype=np.int32)
    alive = np.arange(len(lengths))
    for distance in range(MAX_REPEAT):
        alive = alive[alive >= distance]
        alive = alive[ids[alive - distance] == ids[last - distance]]
        if not len(alive):
            break
        lengths[alive] += 1
    return lengths
