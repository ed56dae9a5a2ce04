"""The KV cache of all layers, in one memory for all KV groups; scales of 8-bit keys and values are in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.config import KVShape
from engine.kernels.interface import LayerCache
from engine.kernels.torch import attention


def kv_cache_bytes(groups: Sequence[Sequence[KVShape]], block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block."""
    num_bytes = dtype.itemsize * attention.numbers_per_token(groups)
    if dtype.itemsize == 1:
        num_bytes += torch.float32.itemsize * attention.numbers_per_token(_of_scales(groups))
    return block_size * num_bytes


def new_kv_cache(
    groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[list[LayerCache]]:
    """Return empty keys and values [B, N, KH, D] of each layer, with scales [B, KH, N] if they have 8 bits.

    The layers of a group lie in a block one after the other.
    """
    if dtype.itemsize > 1:
        return attention.new_kv_cache(groups, num_blocks, block_size, dtype, device)
    codes = attention.new_kv_cache(groups, num_blocks, block_size, torch.uint8, device)
    scales = attention.new_kv_cache(_of_scales(groups), num_blocks, block_size, torch.float32, device)
    return [[_coded(*pair, dtype) for pair in zip(*some, strict=True)] for some in zip(codes, scales, strict=True)]


def _of_scales(groups: Sequence[Sequence[KVShape]]) -> list[list[KVShape]]:
    return [[KVShape(shape.num_kv_heads, 1) for shape in group] for group in groups]


def _coded(codes: LayerCache, scales: LayerCache, dtype: torch.dtype) -> LayerCache:
    num_blocks, block_size, num_kv_heads, _ = codes.keys.shape
    key_scales, value_scales = (
        some.view(num_blocks, num_kv_heads, block_size) for some in (scales.keys, scales.values)
    )
    return LayerCache(codes.shape, codes.keys.view(dtype), codes.values.view(dtype), key_scales, value_scales)
