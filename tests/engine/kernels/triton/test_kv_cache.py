"""The KV cache on a GPU: layers of all groups in one memory."""

import pytest
import torch

from engine.config import KVShape
from engine.kernels.interface import KernelOptions
from engine.kernels.triton.kernels import TritonKernels
from tests.support.tensors import CPU

GROUPS = [[KVShape(2, 64), KVShape(2, 64)], [KVShape(1, 512)], [KVShape(3, 16)]]  # the second is the largest
NUM_BLOCKS, BLOCK_SIZE = 5, 16


@pytest.mark.parametrize(
    ("kv_cache_dtype", "bytes_per_token"),
    [("auto", 2 * 2 * 512), ("int8", 2 * 512 + 2 * 4 * 4), ("fp8", 2 * 512 + 2 * 4 * 4)],
)
def test_groups_share_the_memory(kv_cache_dtype: str, bytes_per_token: int) -> None:
    """Blocks that different groups hold do not overlap, nor do the layers of a group."""
    kernels = TritonKernels(KernelOptions(torch.float16, kv_cache_dtype=kv_cache_dtype), CPU)
    assert kernels.kv_cache_bytes(GROUPS, BLOCK_SIZE) == BLOCK_SIZE * bytes_per_token
    caches = kernels.new_kv_cache(GROUPS, NUM_BLOCKS, BLOCK_SIZE)
    parts: list[list[torch.Tensor]] = []  # of each layer
    for block, (group, shapes) in enumerate(zip(caches, GROUPS, strict=True)):
        for layer, shape in zip(group, shapes, strict=True):
            assert layer.keys.shape == (NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
            tensors = [layer.keys.view(torch.uint8), layer.values.view(torch.uint8)]
            if kv_cache_dtype != "auto":
                assert layer.key_scales is not None
                assert layer.value_scales is not None
                assert layer.key_scales.shape == (NUM_BLOCKS, shape.num_kv_heads, BLOCK_SIZE)
                tensors += [layer.key_scales.view(torch.uint8), layer.value_scales.view(torch.uint8)]
            parts.append([tensor[block] for tensor in tensors])
    assert all(not part.any() for layer in parts for part in layer)
    flat = [part for layer in parts for part in layer]
    for number, part in enumerate(flat):
        part.fill_(number + 1)
    for number, part in enumerate(flat):
        assert (part == number + 1).all()


def test_without_scales() -> None:
    ((cache,),) = TritonKernels(KernelOptions(torch.float16), CPU).new_kv_cache([[KVShape(1, 16)]], 2, 16)
    assert cache.key_scales is None
