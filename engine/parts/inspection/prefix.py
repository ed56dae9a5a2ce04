"""Explains why the prefix cache had no more of a prompt, by comparison with other requests. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.parts.inspection.recorder import notes_of, shown_id
from engine.parts.inspection.records import PrefixResult, PrefixView
from engine.scheduling.record import RequestRecord

PART = 256  # tokens that are compared at a time
MAX_COMPARED = 1 << 18  # tokens compared for one choice, which takes one to ten milliseconds
Other = tuple[RequestRecord, Sequence[int]]  # a request, and its token ids if they are kept


class Nearest(NamedTuple):
    """The earlier request that has most tokens in common with another one."""

    num_common: int = 0
    other: RequestRecord | None = None
    num_tokens: int = 0  # of the earlier request


def explain_prefix(
    record: RequestRecord,
    token_ids: Sequence[int] | None,
    others: Iterable[Other],
    caches_prefixes: bool,
    block_size: int,
) -> PrefixView:
    """Return why a request had as much of its prompt cached as it had.

    `token_ids`: those of the request, None if they are not kept; then only what the scheduler has recorded is known.
    """
    result, similar, position = _explained(record, token_ids, others, caches_prefixes, block_size)
    has_begun = result not in (PrefixResult.PENDING, PrefixResult.CACHING_OFF)
    return PrefixView(
        result=result,
        num_cached_tokens=record.num_cached_tokens,
        num_found_tokens=notes_of(record).num_found_tokens if has_begun else 0,
        num_reusable_tokens=notes_of(record).num_reusable_tokens if has_begun else 0,
        position=position,
        token_id=None if position is None or token_ids is None else token_ids[position],
        similar_id=None if similar is None else shown_id(similar),
    )


def _explained(
    record: RequestRecord,
    token_ids: Sequence[int] | None,
    others: Iterable[Other],
    caches_prefixes: bool,
    block_size: int,
) -> tuple[PrefixResult, RequestRecord | None, int | None]:
    """Return the reason, the most similar earlier request, and where they differ, as far as these are known."""
    started = record.scheduled
    if started is None:
        return PrefixResult.PENDING, None, None
    if not caches_prefixes:
        return PrefixResult.CACHING_OFF, None, None
    result = notes_of(record).prefix_result
    if result is not PrefixResult.NOT_FOUND or token_ids is None:
        return result, None, None
    needed = record.num_cached_tokens + block_size  # the first block that was missing ends here
    start = array("i", token_ids[:needed])
    similar, elsewhere = _nearest(start, (other for other in others if _is_earlier(other[0], started, record)), record)
    if similar is None or elsewhere is None:
        return result, None, None
    if similar.other is not None and similar.num_common >= needed:
        return _why_not_shared(similar.other, needed, started), similar.other, None
    if elsewhere.other is not None and elsewhere.num_common >= needed:
        is_adapter = elsewhere.other.submit.lora_name != record.submit.lora_name
        return PrefixResult.OTHER_ADAPTER if is_adapter else PrefixResult.OTHER_SALT, elsewhere.other, None
    if similar.num_common < record.num_cached_tokens:  # the token ids of the request that cached them are forgotten
        return result, None, None
    if similar.other is None:
        return PrefixResult.NEW, None, None
    if similar.num_common == similar.num_tokens:
        return PrefixResult.ENDED, similar.other, None
    return PrefixResult.DIVERGED, similar.other, similar.num_common


def _nearest(
    start: array[int], others: Iterable[Other], record: RequestRecord
) -> tuple[Nearest, Nearest] | tuple[None, None]:
    """Return which request with the salt of `record` has most of `start` in common, and which one with another salt.

    Return None for both if more than `MAX_COMPARED` tokens would have to be compared.
    """
    nearest = {True: Nearest(), False: Nearest()}
    num_left = MAX_COMPARED
    for other, ids in others:
        best = nearest[notes_of(other).salt == notes_of(record).salt]
        longest = best.num_common
        if longest == len(start) or longest >= len(ids) or ids[longest] != start[longest]:
            continue  # it has no more in common
        length = num_common(start, ids)
        if length > longest:
            nearest[notes_of(other).salt == notes_of(record).salt] = Nearest(length, other, len(ids))
        num_left -= length
        if num_left < 0:
            return None, None
    return nearest[True], nearest[False]


def _why_not_shared(other: RequestRecord, needed: int, started: float) -> PrefixResult:
    """Return why a request did not find the first `needed` tokens of another one with the same tokens and salt."""
    if other.num_prompt_tokens >= needed:
        is_computed = other.first_token is not None and other.first_token <= started
        return PrefixResult.NOT_FOUND if is_computed else PrefixResult.NOT_COMPUTED
    has_ended = other.finished is not None and other.finished <= started
    return PrefixResult.GENERATED if has_ended else PrefixResult.NOT_COMPUTED


def _is_earlier(other: RequestRecord, started: float, record: RequestRecord) -> bool:
    return other is not record and other.scheduled is not None and other.scheduled <= started


def num_common(token_ids: array[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    length = min(len(token_ids), len(other))
    for start in range(0, length, PART):
        end = min(start + PART, length)
        own, others = token_ids[start:end], array("i", other[start:end])
        if own != others:
            return start + next(index for index, pair in enumerate(zip(own, others, strict=True)) if pair[0] != pair[1])
    return length
