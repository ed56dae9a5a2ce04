"""What the sampler does with the logits of a position: stage by stage, with the noise that decides."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from torch import Tensor

from engine.parts.inspection.layers import Pairs, top_pairs
from engine.sampling.sampler import Sampler
from engine.scheduling.request import SamplingRow
from engine.shared.records import Candidate, StageView

NUM_CANDIDATES = 8


def view_stages(
    sampler: Sampler, logits: Tensor, row: SamplingRow, masks: Mapping[int, bytes], num_top: int
) -> Generator[None, None, tuple[list[StageView], list[Candidate]]]:
    """Return the distribution after each stage, and the tokens with the largest sums of logit and noise.

    `logits` [1, V] are those of the model. There are no candidates if the row is greedy. Yields after each stage.
    """
    views: list[StageView] = []
    candidates: list[Candidate] = []
    before: Tensor | None = None
    for name, after in sampler.stages(logits, row, masks):
        if name == "noise" and before is not None:
            candidates = _candidates(before[0], after[0])
        else:
            views.append(_view(name, before, after, num_top))
            before = after
        yield
    return views, candidates


def _view(name: str, before: Tensor | None, after: Tensor, num_top: int) -> StageView:
    is_possible = after.isfinite()
    removed: Pairs = []
    num_removed = 0
    if before is not None:
        is_removed = before.isfinite() & ~is_possible
        num_removed = int(is_removed.sum())
        (removed,) = top_pairs(before.log_softmax(dim=-1).masked_fill(~is_removed, float("-inf")), num_top)
    (top,) = top_pairs(after.log_softmax(dim=-1), num_top)
    return StageView(name, int(is_possible.sum()), num_removed, top, removed)


def _candidates(logits: Tensor, noise: Tensor) -> list[Candidate]:
    sums = (logits + noise).topk(min(NUM_CANDIDATES, len(logits)))
    pairs = zip(sums.indices.tolist(), sums.values.tolist(), strict=True)
    possible = [token_id for token_id, value in pairs if value != float("-inf")]
    return [Candidate(token_id, logits[token_id].item(), noise[token_id].item()) for token_id in possible]
