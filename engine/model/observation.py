"""A forward pass that shows what happens inside: part by part, with all hidden states of all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from engine.batch.inputs import BatchInputs
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
