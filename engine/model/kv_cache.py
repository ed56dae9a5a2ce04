"""The KV cache: the keys and values of all blocks, layer by layer."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.kernels.interface import Kernels, LayerCache


class KVCache:
    """The cache of each layer, in the layout of the kernels: `num_blocks` blocks of `block_size` tokens.

    A block holds the layers of one KV group at a time. A layer that reads the keys and values of another has its cache.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, kernels: Kernels) -> None:
        caches = kernels.new_kv_cache(config.kv_shapes, num_blocks, block_size)
        stored = {
            layer: (number, cache)
            for number, (group, members) in enumerate(zip(config.kv_groups, caches, strict=True))
            for layer, cache in zip(group.layers, members, strict=True)
        }
        sources = [
            index if layer.attention.kv_source is None else layer.attention.kv_source
            for index, layer in enumerate(config.layers)
        ]
        self.groups: list[int] = [stored[source][0] for source in sources]  # the KV group of each layer
        self.layers: list[LayerCache] = [stored[source][1] for source in sources]


def bytes_per_block(config: ModelConfig, block_size: int, kernels: Kernels) -> int:
    """Return the bytes of a block, which holds `block_size` tokens in all layers of a KV group."""
    return kernels.kv_cache_bytes(config.kv_shapes, block_size)
