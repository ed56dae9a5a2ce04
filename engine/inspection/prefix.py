"""Explains why the prefix cache had no more of a prompt, by comparison with other requests. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from engine.scheduling.record import RequestRecord
from engine.shared.records import Prefix, PrefixResult

PART = 256  # tokens that are compared at a time
Other = tuple[RequestRecord, Sequence[int]]  # a request, and its token ids if they are kept


def explain_prefix(
    record: RequestRecord,
    token_ids: Sequence[int] | None,
    others: Iterable[Other],
    caches_prefixes: bool,
    block_size: int,
) -> Prefix:
    """Return why a request had as much of its prompt cached as it had.

    `token_ids`: those of the request, None if they are not kept; then only what the scheduler has recorded is known.
    """
    result, num_reusable = record.prefix_result, record.num_reusable_tokens
    if not caches_prefixes and result is not PrefixResult.PENDING:
        return Prefix(result=PrefixResult.CACHING_OFF, num_reusable_tokens=0)
    if result is not PrefixResult.NOT_FOUND or token_ids is None or record.scheduled is None:
        return Prefix(result=result, num_reusable_tokens=num_reusable)
    started = record.scheduled
    needed = record.num_cached_tokens + block_size  # the first block that was missing ends here
    start = array("i", token_ids[:needed])
    earlier = [(num_common(start, ids), other) for other, ids in others if _is_earlier(other, started, record)]
    similar = [pair for pair in earlier if pair[1].salt == record.salt]
    longest, nearest = max(similar, key=_length, default=(0, None))
    if longest >= needed and nearest is not None:
        return _named(_why_not_shared(nearest, needed, started), nearest, num_reusable)
    elsewhere, other = max(earlier, key=_length, default=(0, None))
    if elsewhere >= needed and other is not None:
        is_adapter = other.lora_name != record.lora_name
        return _named(PrefixResult.OTHER_ADAPTER if is_adapter else PrefixResult.OTHER_SALT, other, num_reusable)
    if longest == 0 or nearest is None:
        return Prefix(result=PrefixResult.NEW, num_reusable_tokens=num_reusable)
    return Prefix(
        result=PrefixResult.DIVERGED,
        num_reusable_tokens=num_reusable,
        position=longest,
        token_id=start[longest],
        similar_id=nearest.shown_id,
    )


def _why_not_shared(other: RequestRecord, needed: int, started: float) -> PrefixResult:
    """Return why a request did not find the first `needed` tokens of another one with the same tokens and salt."""
    if other.num_prompt_tokens >= needed:
        is_computed = other.first_token is not None and other.first_token <= started
        return PrefixResult.NOT_FOUND if is_computed else PrefixResult.NOT_COMPUTED
    has_ended = other.finished is not None and other.finished <= started
    return PrefixResult.GENERATED if has_ended else PrefixResult.NOT_COMPUTED


def _is_earlier(other: RequestRecord, started: float, record: RequestRecord) -> bool:
    return other is not record and other.scheduled is not None and other.scheduled <= started


def _length(pair: tuple[int, RequestRecord]) -> int:
    return pair[0]


def _named(result: PrefixResult, other: RequestRecord, num_reusable: int) -> Prefix:
    return Prefix(result=result, num_reusable_tokens=num_reusable, similar_id=other.shown_id)


def num_common(token_ids: array[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    length = min(len(token_ids), len(other))
    for start in range(0, length, PART):
        end = min(start + PART, length)
        own, others = token_ids[start:end], array("i", other[start:end])
        if own != others:
            return start + next(index for index, pair in enumerate(zip(own, others, strict=True)) if pair[0] != pair[1])
    return length
