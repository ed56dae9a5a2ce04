"""Token masks of a step: what grammars and reasoning budgets allow. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from engine.scheduling.request import Scheduled, Status, Step
from engine.shared.messages import ReasoningLimit

NUM_FIRST_TOKENS = 16  # the tag that begins the reasoning must be among the first tokens of the output


def step_masks(step: Step) -> dict[int, bytes]:
    """Return index among the step's sampled rows -> mask, for the constrained rows; see `sampler.apply_masks`.

    The mask that ends the reasoning replaces that of a grammar, which allows reasoning to end anywhere.
    """
    masks: dict[int, bytes] = {}
    first = 0
    for item in step.scheduled:
        if item.request.matcher is not None and item.num_samples and item.request.status is Status.RUNNING:
            of_item = item.request.matcher.masks(item.request.output_token_ids, item.draft_token_ids)
            masks.update(enumerate(of_item, start=first))
        if item.request.params.reasoning_limit is not None:
            masks.update((first + row, mask) for row, mask in _forced_ends(item, item.request.params.reasoning_limit))
        first += item.num_samples
    return masks


def _forced_ends(item: Scheduled, limit: ReasoningLimit) -> Iterator[tuple[int, bytes]]:
    """Yield the index of the sampled row at which the reasoning budget is used up, with a mask of the end tag alone.

    This depends only on the output, so it survives preemption and drafts. The end can be forced at one position only:
    after `max_tokens` tokens of reasoning, counted from the start tag or, if the prompt has that, from its end.
    """
    request = item.request
    if not item.num_samples or request.status is not Status.RUNNING:
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
