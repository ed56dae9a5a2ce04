"""What is shown of some rows: attention weights, logit lens, norms and experts of the layers, stages of the sampler."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.kernels.torch.experts import route
from engine.parts.inspection.executions import Observation, ObservedExecution, Part
from engine.parts.inspection.records import Candidate, Inspect, LayerView, StageView
from engine.runner import ModelRunner
from engine.sampling.ops import SAMPLING_OPS, apply_ops, gumbel_noise
from engine.sampling.sampler import GREEDY_ORDER, SAMPLED_ORDER, Sampler, apply_masks, banned_token_ids
from engine.scheduling.request import Request, SamplingRow
from engine.shared.messages import GREEDY_TEMPERATURE

NUM_CANDIDATES = 8
DIGITS = 6  # after the point: float32 has about as many, and further ones would make answers twice as long

Pairs = list[tuple[int, float]]  # of a token, a position or an expert and its number


@dataclass(slots=True)
class LayerRows:
    """What one layer does at each row."""

    lens: list[Pairs] = field(default_factory=list)
    residual_norms: list[float] = field(default_factory=list)
    attention_norms: list[float] = field(default_factory=list)
    feed_forward_norms: list[float] = field(default_factory=list)
    heads: list[list[Pairs]] = field(default_factory=list)
    experts: list[Pairs] = field(default_factory=list)
    states: list[tuple[float, float]] = field(default_factory=list)

    def views(self) -> Iterator[LayerView]:
        norms = (self.residual_norms, self.attention_norms, self.feed_forward_norms)
        empty: list[Any] = [[] for _ in self.lens]
        states: list[Any] = self.states or [None] * len(self.lens)
        return map(LayerView, self.lens, *norms, self.heads or empty, self.experts or empty, states)


class LayerObserver:
    """Sees one step of a request, whose rows are the positions from `first` on."""

    def __init__(self, runner: ModelRunner, request: Request, first: int, question: Inspect) -> None:
        self._model = runner.model
        self._kv_cache = runner.kv_cache
        self._request = request
        self._first = first
        self._question = question
        self._layers = [LayerRows() for _ in self._model.layers]
        self._residual = torch.empty(0)  # float32 [T, hidden_size], after the last part
        self.attention: list[bytes] = []  # of each row, the weights of the head that is shown in full: float32
        self.logits: list[Tensor] = []  # [V] of each row

    def run(self, execution: ObservedExecution) -> Generator[None]:
        """Compute the step of the builder. Yields after each slice."""
        for observation in execution.forward():
            self._see(execution, observation)
            yield
            if observation.part is Part.FEED_FORWARD:
                yield from self._look_through_lens(execution, observation)

    def _look_through_lens(self, execution: ObservedExecution, observation: Observation) -> Generator[None]:
        """Compute the logits of a residual stream, in its own type: after the last layer, those of the step."""
        layer = self._layers[observation.layer]
        for rows in torch.split(observation.residual, execution.max_logit_rows):
            logits = execution.compute_logits(rows).clone()
            yield
            layer.lens += top_pairs(logits.log_softmax(dim=-1), self._question.top)
            self.logits += logits if layer is self._layers[-1] else ()
            yield

    def views(self) -> list[list[LayerView]]:
        """Return what each layer does, row by row."""
        return [list(views) for views in zip(*(layer.views() for layer in self._layers), strict=True)]

    def _see(self, execution: ObservedExecution, observation: Observation) -> None:
        index = observation.layer
        if observation.part is Part.PROJECTION:
            if observation.q is not None:
                self._see_attention(execution, index, observation.q)
            if observation.gates is not None:
                means = execution.state_gates(index, observation.gates).mean(dim=-1).T.tolist()
                self._layers[index].states = [(round(kept, DIGITS), round(written, DIGITS)) for kept, written in means]
            return
        before, residual = self._residual, observation.residual.to(torch.float32, copy=True)
        self._residual = residual
        if observation.part is Part.EMBEDDING:
            return
        layer, added = self._layers[index], (residual - before).norm(dim=-1).tolist()
        if observation.part is Part.ATTENTION:
            layer.attention_norms = added
            return
        layer.feed_forward_norms, layer.residual_norms = added, residual.norm(dim=-1).tolist()
        if observation.router_logits is not None:
            layer.experts = self._chosen_experts(index, observation.router_logits)

    def _see_attention(self, execution: ObservedExecution, index: int, q: Tensor) -> None:
        table = self._request.kv.tables[self._kv_cache.groups[index]]
        block_ids = torch.tensor(table.block_ids, dtype=torch.int64, device=q.device)
        weights = execution.attention_weights(index, q, block_ids, self._first)
        self._layers[index].heads = [top_pairs(row, self._question.top, above=0.0) for row in weights]
        if index == self._question.layer and self._question.head is not None:
            rows = weights[:, self._question.head].cpu().numpy()
            self.attention = [row[: self._first + number + 1].tobytes() for number, row in enumerate(rows)]

    def _chosen_experts(self, index: int, logits: Tensor) -> list[Pairs]:
        experts = self._model.layers[index].mlp.experts
        assert experts is not None
        routing = route(logits, experts.spec.router, experts.correction_bias, experts.expert_scales)
        pairs = zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
        return [list(zip(*row, strict=True)) for row in pairs]


def top_pairs(values: Tensor, num_top: int, *, above: float = float("-inf")) -> list[Pairs]:
    """Return the columns of the largest values of each row [R, C] with these, but only values greater than `above`."""
    largest = values.topk(min(num_top, values.shape[1]), dim=-1)
    rows = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    pairs = (zip(*row, strict=True) for row in rows)
    return [[(column, round(value, DIGITS)) for column, value in row if value > above] for row in pairs]


# The sampler.


def stages(
    sampler: Sampler, logits: Tensor, row: SamplingRow, masks: Mapping[int, bytes]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what `sample` does with the logits [1, V] of a row: after each stage that applies, its name and a copy.

    The first stage is `logits` itself. The last one is `noise`, which is added before the argmax is taken, unless
    the row is greedy.
    """
    rows, params = [row], row.params
    logits = logits.clone()
    yield "logits", logits.clone()
    if masks:
        apply_masks(logits, masks)
        yield "grammar", logits.clone()
    if params.logit_bias:
        sampler.apply_bias(logits, rows)
        yield "logit_bias", logits.clone()
    if banned_token_ids(row, sampler.eos_token_ids):
        sampler.ban_tokens(logits, rows)
        yield "banned_tokens", logits.clone()
    if params.allowed_token_ids:
        sampler.allow_only(logits, rows)
        yield "allowed_token_ids", logits.clone()
    is_sampled = params.is_special or params.temperature >= GREEDY_TEMPERATURE
    order = params.order if params.is_special else GREEDY_ORDER + (SAMPLED_ORDER if is_sampled else ())
    for name in order:
        if SAMPLING_OPS[name].is_on(params):
            logits = apply_ops(logits, rows, (name,))
            yield name, logits.clone()
    if is_sampled:
        yield "noise", gumbel_noise(sampler.hashed_ids, rows)


def view_stages(
    sampler: Sampler, logits: Tensor, row: SamplingRow, masks: Mapping[int, bytes], num_top: int
) -> Generator[None, None, tuple[list[StageView], list[Candidate]]]:
    """Return the distribution after each stage, and the tokens with the largest sums of logit and noise.

    `logits` [1, V] are those of the model. There are no candidates if the row is greedy. Yields after each stage.
    """
    views: list[StageView] = []
    candidates: list[Candidate] = []
    before: Tensor | None = None
    for name, after in stages(sampler, logits, row, masks):
        if name == "noise" and before is not None:
            candidates = _candidates(before[0], after[0])
        else:
            views.append(_stage(name, before, after, num_top))
            before = after
        yield
    return views, candidates


def _stage(name: str, before: Tensor | None, after: Tensor, num_top: int) -> StageView:
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
