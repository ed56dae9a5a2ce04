"""A forward pass that shows what happens inside: part by part, with all hidden states of all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.kernels.interface import AttentionScores
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache


class Part(Enum):
    """A part of a forward pass, after which there is something to see."""

    EMBEDDING = auto()
    PROJECTION = auto()  # of a layer's queries, keys and values; these are in the KV cache
    ATTENTION = auto()
    FEED_FORWARD = auto()  # the layer is complete


@dataclass(frozen=True, slots=True)
class Observation:
    """What one part has computed for the T rows of the batch. The next part may overwrite it."""

    part: Part
    layer: int  # -1 before the first
    residual: Tensor  # [T, hidden_size]
    q: Tensor | None = None  # [T, H * D], rotated: of a projection
    router_logits: Tensor | None = None  # float32 [T, E]: of the feed-forward part of a layer with experts


def observe(model: CausalLM, batch: BatchInputs, kv_cache: KVCache) -> Iterator[Observation]:
    """Compute all rows in all layers, as `CausalLM.forward` does with its `hidden_rows`, and yield after each part.

    Like `forward`, this may be recorded with placeholder tensors.
    """
    x = model.embed(batch.token_ids)
    inputs = model.layer_inputs(batch, kv_cache, x, range(len(model.layers)))
    yield Observation(Part.EMBEDDING, -1, x)
    for index, layer in enumerate(model.layers):
        with model.kernels.temporaries():
            projected = layer.project(x, inputs)
            yield Observation(Part.PROJECTION, index, x, q=projected[0])
            layer.attend(x, projected, inputs)
            yield Observation(Part.ATTENTION, index, x)
            router_logits = None
            if layer.mlp.experts is not None:
                router_logits = layer.mlp.router_logits(layer.feed_forward_input(x, projected))
            layer.feed_forward(x, projected, inputs)
            yield Observation(Part.FEED_FORWARD, index, x, router_logits=router_logits)


def attention_weights(q: Tensor, keys: Tensor, first: int, scores: AttentionScores, window: int | None) -> Tensor:
    """Return the weights, float32 [R, H, n], with which the values at n positions are added up for each row and head.

    `q` [R, H, D] are the rotated queries of the positions from `first` on, `keys` [n, KH, D] those of positions 0 to
    n - 1. A head's weights add up to 1, or with an attention sink to less.
    """
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = keys.shape[:2]
    grouped = q.float().view(num_rows, num_kv_heads, -1, head_dim)
    products = torch.einsum("rkgd,nkd->rkgn", grouped, keys).reshape(num_rows, num_heads, num_keys) * scores.scale
    if scores.softcap is not None:
        products = (products / scores.softcap).tanh() * scores.softcap
    rows = torch.arange(first, first + num_rows, device=q.device)[:, None]
    distance = rows - torch.arange(num_keys, device=q.device)
    is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    products.masked_fill_(is_hidden[:, None], float("-inf"))
    if scores.sinks is None:
        return products.softmax(dim=-1)
    sinks = scores.sinks.float()[None, :, None].expand(num_rows, -1, 1)
    return torch.cat((products, sinks), dim=-1).softmax(dim=-1)[..., :-1]
