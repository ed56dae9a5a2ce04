"""Replace the modules of a decoder whose results are parts of a sum, or of a row, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.kernels.interface import LinearOp
from engine.model import CausalLM, Parameters
from engine.model.attention import Attention
from engine.model.layer_builder import FeedForward
from engine.model.linear import Linear
from engine.model.mlp import MLP, Experts
from engine.model.variants import MLPAndExperts
from engine.parts.distributed.collectives import Collectives
from engine.parts.distributed.plan import ShardingPlan
from engine.weights.layout import HEAD


class RowParallelLinear(Linear):
    """A linear layer of whose inputs each rank has a part. LoRA adapters add to the part of the sum."""

    def __init__(self, linear: Linear, collectives: Collectives) -> None:
        self.__dict__ |= linear.__dict__
        self.collectives = collectives

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.collectives.sum(super().__call__(x, lora_slots), residual)


class RowParallelExperts(Experts):
    """Experts, and maybe shared ones, each of which has a part of its inner numbers on each rank."""

    def __init__(self, experts: Experts, collectives: Collectives) -> None:
        self.__dict__ |= experts.__dict__
        self.collectives = collectives

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None, logits: Tensor | None = None) -> Tensor:
        return self.collectives.sum(super().__call__(x, lora_slots, None, logits), residual)


class NormedProjection(Linear):
    """The projection to queries, keys and values, of which the first two are normed over the heads of all ranks."""

    def __init__(
        self, linear: Linear, norms: Sequence[Tensor], rank: int, collectives: Collectives, eps: float
    ) -> None:
        """`norms`: the weights for the queries, and for the keys, of all heads."""
        self.__dict__ |= linear.__dict__
        self.norms = norms
        self.rank = rank
        self.collectives = collectives
        self.eps = eps

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None = None) -> Tensor:
        q, k, v = torch.split(super().__call__(x, lora_slots), self.sizes, dim=1)
        return self.kernels.concat([self._norm(q, self.norms[0]), self._norm(k, self.norms[1]), v])

    def _norm(self, heads: Tensor, weight: Tensor) -> Tensor:
        size = heads.shape[1]
        every = self.collectives.gather(heads, [size] * (len(weight) // size))
        return self.kernels.rms_norm(every, weight, self.eps)[:, self.rank * size : (self.rank + 1) * size]


def build_parallel(plan: ShardingPlan, parameters: Parameters, collectives: Collectives, **options: Any) -> CausalLM:
    """Return this rank's part of a model. `options` are those of `CausalLM`."""
    kernels, config = options["kernels"], plan.config
    head = kernels.pack([parameters.take_weight(HEAD, plan.vocabulary_sizes[plan.rank], config.hidden_size)])
    norms = [_take_norms(parameters, plan, index) for index in range(config.num_hidden_layers)]
    model = CausalLM(plan.local_config(), parameters, **options)
    for layer, weights in zip(model.layers, norms, strict=True):
        attention = layer.self_attn
        if weights and isinstance(attention, Attention):
            attention.qkv_proj = NormedProjection(
                attention.qkv_proj, weights, plan.rank, collectives, config.rms_norm_eps
            )
        attention.o_proj = RowParallelLinear(attention.o_proj, collectives)
        layer.mlp = parallel_feed_forward(layer.mlp, collectives)
    model.lm_head = gathering(kernels.linear(head, is_float32=True), plan.vocabulary_sizes, collectives)
    return model


def parallel_feed_forward(module: FeedForward, collectives: Collectives) -> FeedForward:
    """Return a module of the decoder whose results are those of all ranks."""
    if isinstance(module, Experts):
        return RowParallelExperts(module, collectives)
    if isinstance(module, MLPAndExperts):
        module.experts = RowParallelExperts(module.experts, collectives)
    mlp = module.mlp if isinstance(module, MLPAndExperts) else module
    assert isinstance(mlp, MLP)
    mlp.down_proj = RowParallelLinear(mlp.down_proj, collectives)
    return module


def gathering(product: LinearOp, sizes: Sequence[int], collectives: Collectives) -> LinearOp:
    """Return a product whose outputs are those of all ranks side by side."""

    def gathered(x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None
        return collectives.gather(product(x), sizes)

    return gathered


def _take_norms(parameters: Parameters, plan: ShardingPlan, layer: int) -> list[Tensor]:
    """Return the weights of the norms of all heads at once of a layer; an empty list if it has none."""
    attention = plan.config.layers[layer].attention
    if attention is None or attention.qk_norm != "all":
        return []
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads}
    prefix, size = f"model.layers.{layer}.self_attn", attention.head_dim
    return [parameters.take(f"{prefix}.{name}_norm.weight", num * size) for name, num in heads.items()]
