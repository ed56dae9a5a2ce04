"""Activation and rotation in plain torch: against float64, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.kernels.interface import KernelOptions, LayerCache
from engine.kernels.torch.kernels import TorchKernels
from tests.support.examples import num_examples
from tests.support.tensors import ACTIVATIONS, CPU, assert_close, random_tensor

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul(kernels: TorchKernels, activation: str) -> None:
    gate_up = random_tensor(0, 20, 2 * 75, dtype=kernels.dtype) * 3
    gate_up[0, :5] = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    before = gate_up.clone()
    expected = ACTIVATIONS[activation](gate_up[:, :75].double()) * gate_up[:, 75:].double()
    out = kernels.act_and_mul(gate_up, activation)
    assert out.dtype == kernels.dtype
    assert_close(out, expected, kernels.dtype)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("size", [24, 100, 1000, 1536, 2816])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul_does_not_depend_on_the_batch(
    kernels: TorchKernels, num_threads: int, activation: str, size: int
) -> None:
    gate_up = random_tensor(size, 120, 2 * size, dtype=kernels.dtype)
    alone = torch.cat([kernels.act_and_mul(row[None].clone(), activation) for row in gate_up])
    for rows in (2, 3, 5, 33, 64, 111, 120):
        assert torch.equal(kernels.act_and_mul(gate_up[:rows], activation), alone[:rows]), f"{rows} rows"


@settings(max_examples=num_examples(10, 150), deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([16, 32]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_rope_and_store_kv(
    num_rows: int, num_kv_heads: int, group_size: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    heads = [num_kv_heads * group_size, num_kv_heads, num_kv_heads]
    # Views into one product, as in the model.
    qkv = random_tensor(seed, num_rows, sum(heads), head_dim, dtype=dtype)
    q, k, v = torch.split(qkv, heads, dim=1)
    angles = torch.rand(num_rows, head_dim // 2, generator=torch.Generator().manual_seed(seed)) * 1000
    cos, sin = angles.cos(), angles.sin()
    generator = torch.Generator().manual_seed(seed)
    slot_mapping = torch.randperm(10 * block_size, generator=generator)[:num_rows]
    before = random_tensor(seed + 1, 10, block_size, num_kv_heads, head_dim, dtype=dtype)
    cache = LayerCache(before.clone(), before.clone())

    rotated = TorchKernels(KernelOptions(dtype), CPU).rope_and_store_kv(q, k, v, cos, sin, slot_mapping, cache)

    by_head = (q.transpose(0, 1)[None].double(), k.transpose(0, 1)[None].double())
    both = (cos.repeat(1, 2)[None].double(), sin.repeat(1, 2)[None].double())
    expected_q, expected_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*by_head, *both))
    assert_close(rotated, expected_q, dtype)
    assert_close(cache.keys.flatten(0, 1)[slot_mapping], expected_k, dtype)
    assert torch.equal(cache.values.flatten(0, 1)[slot_mapping], v)
    others = torch.ones(10 * block_size, dtype=torch.bool)
    others[slot_mapping] = False
    for tensor in (cache.keys, cache.values):
        assert torch.equal(tensor.flatten(0, 1)[others], before.flatten(0, 1)[others])
