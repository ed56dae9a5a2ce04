"""Which tokens a step's rows may yield, by their requests' grammars and limits of thoughts. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from engine.scheduling.request import Scheduled, Status, Step

NUM_FIRST_TOKENS = 16  # of the output, among which the tag is that begins thoughts


def step_masks(step: Step) -> dict[int, bytes]:
    """The masks of a step's constrained rows: which of the rows that yield a token -> which tokens it may be.

    A grammar lets thoughts end anywhere.
    """
    masks: dict[int, bytes] = {}
    first = 0
    for item in step.scheduled:
        if item.request.matcher is not None and item.num_samples and item.request.status is Status.RUNNING:
            of_item = item.request.matcher.masks(item.request.output_token_ids, item.draft_token_ids)
            masks.update(enumerate(of_item, start=first))
        masks.update((first + row, mask) for row, mask in _forced_ends(item))
        first += item.num_samples
    return masks


def _forced_ends(item: Scheduled) -> Iterator[tuple[int, bytes]]:
    """The rows that yield a token, counted from 0, at which thoughts are as long as they may be -> a mask of their end.

    This depends on the output alone, so it survives preemption and drafts. An end that is forced can only be at one
    place, so no other is looked at: where as many tokens as are allowed follow the tag, or the prompt that has it.
    """
    request, limit = item.request, item.request.params.thinking
    if limit is None or not item.num_samples or request.status is not Status.RUNNING:
        return
    if request.num_output_tokens > NUM_FIRST_TOKENS + limit.max_tokens:
        return
    output = request.output_token_ids + item.draft_token_ids
    first = 0
    if not limit.is_open:
        if limit.start_id not in output[:NUM_FIRST_TOKENS]:
            return
        first = output.index(limit.start_id) + 1
    row = first + limit.max_tokens - request.num_output_tokens
    if 0 <= row < item.num_samples and limit.end_id not in output[first : first + limit.max_tokens]:
        yield row, bytes(limit.end_id >> 3) + bytes([1 << (limit.end_id & 7)])
