"""A forward pass that shows what happens inside: part by part, with all hidden states of all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.model.decoder import CausalLM, DecoderLayer
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
    kernels = model.kernels
    x = kernels.embed(batch.token_ids, model.embed_tokens, model.config.embedding_scale)
    rows = model.row_inputs(batch, x)
    inputs = model.plan(batch, batch.query_lens, range(len(model.layers)))
    yield Observation(Part.EMBEDDING, -1, x)
    for index, layer in enumerate(model.layers):
        group, cache = kv_cache.groups[index], kv_cache.layers[index]
        with kernels.temporaries():
            projected = layer.project(x, rows, group, cache)
            yield Observation(Part.PROJECTION, index, x, q=projected[0])
            layer.attend(x, projected[0], group, cache, inputs, rows.lora_slots)
            yield Observation(Part.ATTENTION, index, x)
            router_logits = _router_logits(layer, x, projected)
            layer.feed_forward(x, projected, rows.lora_slots)
            layer.finish(x, rows.layer_inputs, index, rows.lora_slots)
            yield Observation(Part.FEED_FORWARD, index, x, router_logits=router_logits)


def _router_logits(layer: DecoderLayer, residual: Tensor, projected: list[Tensor]) -> Tensor | None:
    if layer.experts is None:
        return None
    x = layer.experts_input(layer.feed_forward_input(residual, projected), residual)
    return layer.experts.router_logits(x, residual)
