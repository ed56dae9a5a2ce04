"""The size of a block is that of the tensors that the kernels allocate."""

import pytest
import torch

from engine.kernels.interface import KernelOptions, Kernels
from engine.kernels.load import load_kernels
from engine.model.layer_inputs import KVCache
from engine.parts.triton.kernels import TritonKernels
from tests.support.model_configs import TINY, llama_config

CPU = torch.device("cpu")
MODEL = llama_config(**TINY | {"hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 4096})


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "block_size"),
    [("float32", "auto", 16), ("bfloat16", "auto", 256), ("bfloat16", "int8", 16)],
)
def test_bytes_of_the_kernels_of_this_processor(dtype: str, kv_cache_dtype: str, block_size: int) -> None:
    """int8 has a float32 scale for each key and value of a head."""
    options = KernelOptions(
        getattr(torch, dtype), kv_cache_dtype=kv_cache_dtype, head_dims=frozenset({16}), block_size=block_size
    )
    kernels = load_kernels(CPU, options)
    stored = torch.int8 if kv_cache_dtype == "int8" else options.dtype
    assert_bytes_are_those_of_the_tensors(kernels, block_size, stored)
    scale_bytes = 4 if kv_cache_dtype == "int8" else 0
    num_bytes = kernels.kv_cache_bytes(MODEL.kv_shapes, block_size)
    assert num_bytes == 2 * 3 * block_size * 2 * (16 * stored.itemsize + scale_bytes)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "dtype"), [("auto", torch.float16), ("int8", torch.int8), ("fp8", torch.uint8)]
)
def test_bytes_of_the_kernels_of_a_gpu(kv_cache_dtype: str, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(torch.float16, kv_cache_dtype=kv_cache_dtype), CPU)
    assert_bytes_are_those_of_the_tensors(kernels, 16, dtype)


def assert_bytes_are_those_of_the_tensors(kernels: Kernels, block_size: int, dtype: torch.dtype) -> None:
    cache = KVCache(MODEL, 7, block_size, kernels)
    assert len(cache.layers) == 3
    num_bytes = 0
    for layer in cache.layers.values():
        assert layer.keys.numel() == layer.values.numel() == 7 * block_size * 2 * 16
        assert layer.keys.dtype == layer.values.dtype == dtype
        tensors = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
        num_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert num_bytes == 7 * kernels.kv_cache_bytes(MODEL.kv_shapes, block_size)
