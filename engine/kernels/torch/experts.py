"""Mixture of experts (Shazeer et al. 2017) in plain torch: the router's choice, and products expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.interface import ExpertLinearOp, LinearOp


@dataclass(frozen=True, slots=True)
class TorchRouting:
    """The experts of each row, in descending order of their scores. Pair t * k + j is row t and its expert j."""

    experts: Tensor  # int64 [T, k]
    weights: Tensor  # float32 [T, k]


def route(
    logits: Tensor, router: RouterSpec, bias: Tensor | None = None, expert_scales: Tensor | None = None
) -> TorchRouting:
    """Choose the experts of each row by its logits, float32 [T, E]."""
    scores = logits.sigmoid() if router.scoring == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    choice = _best_groups(choice, router)
    # A stable sort, because ties go to the lowest expert.
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, : router.num_experts_per_tok]
    weights = scores.gather(1, experts)
    if router.normalize:
        total = sum(weights.unbind(1)[1:], weights[:, 0])  # in a fixed order
        weights = weights / (total[:, None] + 1e-20)
    weights = weights * router.scale
    return TorchRouting(experts, weights if expert_scales is None else weights * expert_scales[experts])


def _best_groups(scores: Tensor, router: RouterSpec) -> Tensor:
    """Return the scores [T, E], with -inf for experts whose group is none of the best."""
    if router.num_groups == 1:
        return scores
    groups = scores.view(len(scores), router.num_groups, scores.shape[1] // router.num_groups)
    highest = groups.sort(dim=-1, descending=True, stable=True).values
    group_scores = highest[..., 0] if router.group_score == "max" else highest[..., 0] + highest[..., 1]
    best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, : router.topk_group]
    is_best = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    kept: Tensor = groups.masked_fill(~is_best[..., None], float("-inf")).flatten(1)
    return kept


def expert_linear(products: Sequence[LinearOp], num_columns: int) -> ExpertLinearOp:
    """Return the operation that computes the product of each pair's expert, in the order of pairs, [T * k, M]."""

    def product(x: Tensor, routing: TorchRouting) -> Tensor:
        chosen = routing.experts.flatten()
        rows = torch.arange(len(chosen), device=x.device)
        if len(x) != len(chosen):
            rows = rows // routing.experts.shape[1]
        out = x.new_empty((len(chosen), num_columns))
        for expert in set(chosen.tolist()):
            pairs = (chosen == expert).nonzero()[:, 0]
            out[pairs] = products[expert](x[rows[pairs]])
        return out

    return product


def combine_experts(x: Tensor, routing: TorchRouting, residual: Tensor | None = None) -> Tensor:
    """Return the sum of the results x [T * k, K] of each row's experts, times their weights, or add it to `residual`.

    Sums are float32.
    """
    results = x.float().view(*routing.experts.shape, x.shape[1]) * routing.weights[..., None]
    total = results[:, 0]
    for index in range(1, results.shape[1]):
        total = total + results[:, index]
    return total.to(x.dtype) if residual is None else residual.add_(total.to(x.dtype))
