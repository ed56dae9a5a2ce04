"""What each layer reads besides hidden states: the KV cache, and what a batch gives to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.config import AttentionKind, ModelConfig
from engine.kernels.interface import Kernels, LayerCache, Rotations
from engine.model.rotary import gather_rotations
from engine.shared.parts import engine_part


class KVCache:
    """The cache of each layer, in the layout of the kernels: `num_blocks` blocks of `block_size` tokens.

    A block holds the layers of one KV group at a time. A layer that reads the keys and values of another has its cache.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, kernels: Kernels, num_states: int = 0
    ) -> None:
        caches = kernels.new_kv_cache(config.kv_shapes, num_blocks, block_size)
        stored = {
            layer: (number, cache)
            for number, (group, members) in enumerate(zip(config.kv_groups, caches, strict=True))
            for layer, cache in zip(group.layers, members, strict=True)
        }
        sources = {
            index: index if attention.kv_source is None else attention.kv_source
            for index, attention in config.attentions.items()
        }
        # By the numbers of the layers that have attention.
        self.groups: dict[int, int] = {index: stored[source][0] for index, source in sources.items()}
        self.layers: dict[int, LayerCache] = {index: stored[source][1] for index, source in sources.items()}
        self.states: dict[int, Tensor] = {}  # of the other layers, float32 [num_states, size]
        if num_states:
            self.states = engine_part("hybrid", "mixers").new_states(config, num_states, kernels.device)


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of each layer, of all T rows of a batch or of its `hidden_rows`."""

    kv_cache: KVCache
    rotations: list[Rotations]  # of the row's position, by each table of rotary embeddings
    slot_mappings: list[Tensor]  # int64 [T] of each KV group, the slot of the KV cache for the row's key and value
    block_tables: list[Tensor]  # of each KV group
    plans: dict[AttentionKind, Any]  # of attention
    lora_slots: Tensor  # int64 [T], the slot of the row's LoRA adapter; -1: none; empty if no row has one
    states: Tensor | None  # `StateMove` of each sequence, with all of its rows even in the inputs of `hidden_rows`
    own: list[Tensor]  # [T, size] for each layer: the input of that layer alone, if the model has such inputs

    def of_hidden_rows(
        self, kernels: Kernels, batch: BatchInputs, plans: dict[AttentionKind, Any], config: ModelConfig, layers: range
    ) -> LayerInputs:
        """Return the inputs of `hidden_rows`. The first of `layers` has been given its rotations, the others need them.

        The slots of keys and values stay those of all rows: later layers store none.
        """
        attentions = (config.layers[index].attention for index in layers[1:])
        used = {attention.rope for attention in attentions if attention is not None}
        rotations = [
            gather_rotations(kernels, rotation, batch.hidden_rows) if index in used else rotation
            for index, rotation in enumerate(self.rotations)
        ]
        own = [
            kernels.gather(each, batch.hidden_rows) if index in layers else each for index, each in enumerate(self.own)
        ]
        return replace(self, rotations=rotations, plans=plans, lora_slots=batch.hidden_lora_slots, own=own)
