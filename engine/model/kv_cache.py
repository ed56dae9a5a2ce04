"""The KV cache: the keys and values of all blocks, layer by layer."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.kernels.interface import Kernels, LayerCache


class KVCache:
    """The cache of each layer, in the layout of the kernels: `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, kernels: Kernels) -> None:
        self.layers: list[LayerCache] = kernels.new_kv_cache(
            config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim
        )


def bytes_per_block(config: ModelConfig, block_size: int, kernels: Kernels) -> int:
    """Return the bytes that a block of `block_size` tokens takes in all layers."""
    return kernels.kv_cache_bytes(block_size, config.num_key_value_heads, config.head_dim) * config.num_hidden_layers
