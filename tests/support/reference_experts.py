"""Mixtures of experts in float64: the router's choice, and the weighted sum of the experts' results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import RouterSpec
from tests.support.tensors import random_tensor

Array = NDArray[np.float64]
SIGMOID_GROUPS: dict[str, Any] = {"scoring": "sigmoid", "group_score": "top2"}
ROUTERS: dict[str, RouterSpec] = {
    "Mixtral": RouterSpec(num_experts=8, num_experts_per_tok=2),
    "Qwen 3": RouterSpec(num_experts=128, num_experts_per_tok=8),
    "OLMoE": RouterSpec(num_experts=64, num_experts_per_tok=8, normalize=False),
    "scaled": RouterSpec(num_experts=6, num_experts_per_tok=3, normalize=False, scale=2.5),
    "sigmoid": RouterSpec(num_experts=7, num_experts_per_tok=2, scoring="sigmoid"),
    "DeepSeek V2": RouterSpec(
        num_experts=160, num_experts_per_tok=6, normalize=False, scale=16.0, num_groups=8, topk_group=3
    ),
    "DeepSeek V3": RouterSpec(
        num_experts=256, num_experts_per_tok=8, scale=2.5, num_groups=8, topk_group=4, **SIGMOID_GROUPS
    ),
    "groups": RouterSpec(num_experts=16, num_experts_per_tok=4, num_groups=4, topk_group=2, **SIGMOID_GROUPS),
    "all": RouterSpec(num_experts=3, num_experts_per_tok=3),
    "one": RouterSpec(num_experts=1, num_experts_per_tok=1),
}


@dataclass(frozen=True)
class Inputs:
    """What a router reads."""

    logits: Tensor  # float32 [T, E]
    bias: Tensor | None
    expert_scales: Tensor | None


def router_inputs(router: RouterSpec, num_rows: int, seed: int, *, has_bias: bool, has_scales: bool) -> Inputs:
    """Return random inputs. Logits are multiples of 1/2, so there are many ties; a bias then breaks some of them."""
    logits = (random_tensor(seed, num_rows, router.num_experts) * 4).round() / 2
    bias = (random_tensor(seed + 1, router.num_experts) * 2).round() / 4 if has_bias else None
    scales = random_tensor(seed + 2, router.num_experts).abs() + 0.5 if has_scales else None
    return Inputs(logits, bias, scales)


def routing(inputs: Inputs, router: RouterSpec) -> tuple[NDArray[np.int64], Array]:
    """Return the experts [T, k] of each row in descending order of their scores, and their weights."""
    logits = inputs.logits.double().numpy()
    if router.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    choice = scores + (0.0 if inputs.bias is None else inputs.bias.double().numpy())
    experts = np.array([_best(row, router) for row in choice])
    weights = np.take_along_axis(scores, experts, axis=1)
    if router.normalize:
        weights /= weights.sum(axis=1, keepdims=True)
    weights = weights * router.scale
    if inputs.expert_scales is not None:
        weights = weights * inputs.expert_scales.double().numpy()[experts]
    return experts, weights


def _best(choice: Array, router: RouterSpec) -> list[int]:
    """Return the chosen experts of one row."""
    size = router.num_experts // router.num_groups
    groups = [list(range(first, first + size)) for first in range(0, router.num_experts, size)]
    counted = 1 if router.group_score == "max" else 2
    order = sorted(range(len(groups)), key=lambda g: (-sum(sorted(choice[groups[g]])[::-1][:counted]), g))
    allowed = [expert for group in order[: router.topk_group] for expert in groups[group]]
    return sorted(allowed, key=lambda expert: (-choice[expert], expert))[: router.num_experts_per_tok]


def clear_rows(inputs: Inputs, router: RouterSpec) -> list[int]:
    """Return the rows in which float32 chooses like float64: no two choices are nearly, but not exactly, equal."""
    if inputs.bias is None:
        return list(range(len(inputs.logits)))  # equal logits have equal scores
    exact = inputs.logits.double()
    scores = exact.sigmoid() if router.scoring == "sigmoid" else exact.softmax(dim=1)
    choice = (scores + inputs.bias.double()).sort(dim=1).values
    gaps = choice.diff(dim=1)
    is_near = (gaps > 0) & (gaps < 1e-6)
    return [row for row in range(len(exact)) if not is_near[row].any()]


def mixture(x: Tensor, inputs: Inputs, router: RouterSpec, apply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the sum of each row's experts, `apply(expert, row)`, times their weights, in float64."""
    experts, weights = routing(inputs, router)
    rows: list[Any] = []
    for row, chosen, row_weights in zip(x.double(), experts.tolist(), weights.tolist(), strict=True):
        results = [weight * apply(expert, row) for expert, weight in zip(chosen, row_weights, strict=True)]
        rows.append(torch.stack(results).sum(dim=0))
    return torch.stack(rows)
