"""DRY ("don't repeat yourself", p-e-w 2024): penalties on tokens that would lengthen a repeat of earlier text.

The longer the repeat, the larger the penalty. No torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.scheduling.request import SamplingRow
from engine.shared.messages import ExtraSamplers

MAX_REPEAT = 256  # tokens; longer repeats count as this long, which bounds the work on a text of one repeated word
MAX_LOG_PENALTY = 69.0  # exp(69) still fits in float32
MAX_PENALTY = 1e30  # stays finite in float32, also after division by the lowest temperature

IntArray = npt.NDArray[np.int32]


def repeat_penalties(row: SamplingRow, extra: ExtraSamplers) -> dict[int, float]:
    """Return token id -> penalty to subtract from its logit: multiplier * base ** (repeat length - allowed length).

    A repeat is a run of tokens at the end of the text that also occurs earlier; the penalised token is the one that
    followed it there. Repeats do not extend back across a sequence breaker, and single-token breakers get no penalty.
    """
    ids = np.concatenate([np.array(some, dtype=np.int32) for some in (row.request.history(), row.draft_token_ids)])
    first = max(0, len(ids) - extra.dry_penalty_last_n) if extra.dry_penalty_last_n >= 0 else 0
    window = ids[first:]
    lengths = _repeat_lengths(row, ids)[first:]
    lengths = np.minimum(lengths, np.minimum(np.arange(1, len(lengths) + 1), _max_length(window, extra)))
    followers = window[1:]
    is_long = lengths >= max(1, extra.dry_allowed_length)
    order = np.argsort(lengths[is_long])  # if a token followed several repeats, the longest comes last and wins
    longest = dict(zip(followers[is_long][order].tolist(), lengths[is_long][order].tolist(), strict=True))
    singles = [breaker.first_ids for breaker in extra.dry_breakers if not breaker.rest]
    return {
        token_id: _penalty(length, extra)
        for token_id, length in longest.items()
        if not any(_contains(ids, token_id) for ids in singles)
    }


def _penalty(length: int, extra: ExtraSamplers) -> float:
    exponent = length - extra.dry_allowed_length
    if extra.dry_base > 1:
        exponent = min(exponent, int(MAX_LOG_PENALTY / math.log(extra.dry_base)))
    return min(extra.dry_multiplier * extra.dry_base**exponent, MAX_PENALTY)


def _max_length(ids: IntArray, extra: ExtraSamplers) -> int:
    """Return how many tokens follow the last sequence breaker, at most MAX_REPEAT."""
    if not extra.dry_breakers:
        return MAX_REPEAT
    first_ids = {breaker.rest: breaker.first_ids for breaker in extra.dry_breakers}
    lengths = _lengths_by_last([rest for rest in first_ids if rest])
    tail: list[int] = ids[-MAX_REPEAT - max(map(len, first_ids)) - 1 :].tolist()
    for num_after in range(min(MAX_REPEAT, len(tail))):
        end = len(tail) - num_after
        for length in (0, *lengths.get(tail[end - 1], ())):
            found = first_ids.get(tuple(tail[end - length : end])) if length < end else None
            if found is not None and _contains(found, tail[end - length - 1]):
                return num_after
    return MAX_REPEAT


def _lengths_by_last(sequences: Iterable[tuple[int, ...]]) -> dict[int, set[int]]:
    """Return the lengths of the sequences that end with each token."""
    lengths: dict[int, set[int]] = {}
    for sequence in sequences:
        lengths.setdefault(sequence[-1], set()).add(len(sequence))
    return lengths


def _contains(ascending: Sequence[int], value: int) -> bool:
    index = bisect_left(ascending, value)
    return index < len(ascending) and ascending[index] == value


def _repeat_lengths(row: SamplingRow, ids: IntArray) -> IntArray:
    """Return, for each position but the last, how many tokens up to it equal those at the end; at most MAX_REPEAT.

    The lengths for a text extend to those for a longer text. So the request's state keeps the lengths for its own
    tokens; those for a draft are not kept.
    """
    num_own = len(ids) - len(row.draft_token_ids)
    lengths = row.state.repeat_lengths
    if lengths is None or not 0 < len(lengths) < num_own:
        lengths = _scan(ids[:num_own])
    lengths = row.state.repeat_lengths = _extend(lengths, ids[:num_own])
    return _extend(lengths, ids)


def _extend(lengths: IntArray, ids: IntArray) -> IntArray:
    """Return the lengths for all of `ids`, given those for its beginning."""
    for last in range(len(lengths) + 1, len(ids)):
        longer = np.minimum(np.concatenate((np.zeros(1, dtype=np.int32), lengths)) + 1, MAX_REPEAT)
        lengths = np.where(ids[:last] == ids[last], longer, 0).astype(np.int32)
    return lengths


def _scan(ids: IntArray) -> IntArray:
    """Return the lengths for `ids` from scratch, in one pass per length over the positions that still match."""
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
