"""Rotation of heads and the KV cache in plain torch: against transformers and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.config import KVShape
from engine.kernels.interface import HeadNorms, KernelOptions, LayerCache, Rotations
from engine.kernels.torch.kernels import TorchKernels
from tests.support.examples import num_examples
from tests.support.tensors import CPU, assert_close, random_tensor, rms_norm

DTYPES = [torch.float32, torch.bfloat16]


@settings(max_examples=num_examples(10, 150), deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([16, 32]),
    dtype=st.sampled_from(DTYPES),
    query_scale=st.sampled_from([1.0, 1.5]),
    seed=st.integers(0, 2**32),
)
def test_rope_and_store_kv(
    *,
    num_rows: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    query_scale: float,
    seed: int,
) -> None:
    heads = [num_kv_heads * group_size, num_kv_heads, num_kv_heads]
    # Views into one product, as in the model.
    qkv = random_tensor(seed, num_rows, sum(heads), head_dim, dtype=dtype)
    q, k, v = torch.split(qkv, heads, dim=1)
    angles = torch.rand(num_rows, head_dim // 2, generator=torch.Generator().manual_seed(seed)) * 1000
    cos, sin = angles.cos(), angles.sin()
    table = torch.cat((cos, sin), dim=1)
    rotations = Rotations(table * query_scale, table)
    generator = torch.Generator().manual_seed(seed)
    slot_mapping = torch.randperm(10 * block_size, generator=generator)[:num_rows]
    stored = torch.rand(num_rows, generator=generator) < 0.9  # the others are padding
    slot_mapping[~stored] = -1
    before = random_tensor(seed + 1, 10, block_size, num_kv_heads, head_dim, dtype=dtype)
    cache = LayerCache(KVShape(num_kv_heads, head_dim), before.clone(), before.clone())

    rotated = TorchKernels(KernelOptions(dtype), CPU).rope_and_store_kv(q, k, v, rotations, slot_mapping, cache)

    by_head = (q.transpose(0, 1)[None].double(), k.transpose(0, 1)[None].double())
    both = (cos.repeat(1, 2)[None].double(), sin.repeat(1, 2)[None].double())
    expected_q, expected_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*by_head, *both))
    assert_close(rotated, expected_q * query_scale, dtype)
    slots = slot_mapping[stored]
    assert_close(cache.keys.flatten(0, 1)[slots], expected_k[stored], dtype)
    assert torch.equal(cache.values.flatten(0, 1)[slots], v[stored])
    others = torch.ones(10 * block_size, dtype=torch.bool)
    others[slots] = False
    for tensor in (cache.keys, cache.values):
        assert torch.equal(tensor.flatten(0, 1)[others], before.flatten(0, 1)[others])


@pytest.mark.parametrize("norm", ["head", "all"])
@pytest.mark.parametrize("has_values", [True, False], ids=["values", "values of another layer"])
def test_norms_of_heads(norm: str, has_values: bool) -> None:
    """Without an angle to turn by, what is stored and returned is what the norms make of it."""
    num_rows, num_heads, num_kv_heads, size = 7, 4, 2, 16
    q, k, v = (
        random_tensor(seed, num_rows, heads, size) for seed, heads in ((1, num_heads), (2, num_kv_heads), (3, 2))
    )
    widths = {"q": num_heads, "k": num_kv_heads} if norm == "all" else {"q": 1, "k": 1}
    weights = {name: random_tensor(9, width * size) for name, width in widths.items()}
    norms = HeadNorms(weights["q"], weights["k"], torch.ones(size), 1e-3)
    table = torch.cat((torch.ones(num_rows, size // 2), torch.zeros(num_rows, size // 2)), dim=1)
    shape = KVShape(num_kv_heads, size)
    cache = LayerCache(shape, *(torch.zeros(1, num_rows, num_kv_heads, size) for _ in range(2)))
    kernels, slots = TorchKernels(KernelOptions(torch.float32), CPU), torch.arange(num_rows)
    stored_k, stored_v = (k, v) if has_values else (None, None)
    out = kernels.rope_and_store_kv(q, stored_k, stored_v, Rotations(table, table), slots, cache, norms)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.reshape(-1, len(weight)), weight, 1e-3).view(x.shape)

    assert_close(out, normed(q, weights["q"]), torch.float32)
    if has_values:
        assert_close(cache.keys[0], normed(k, weights["k"]), torch.float32)
        assert_close(cache.values[0], normed(v, torch.ones(size)), torch.float32)
    else:
        assert not cache.keys.any()
        assert not cache.values.any()
