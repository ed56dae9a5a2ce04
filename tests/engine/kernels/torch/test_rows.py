"""Activation and rotation in plain torch: against float64, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.config import KVShape
from engine.kernels.interface import HeadNorms, KernelOptions, LayerCache, Rotations
from engine.kernels.torch.kernels import TorchKernels
from tests.support.examples import num_examples
from tests.support.tensors import ACTIVATIONS, CPU, assert_close, clamped_swiglu, random_tensor, rms_norm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul(kernels: TorchKernels, activation: str) -> None:
    gate_up = random_tensor(0, 20, 2 * 75, dtype=kernels.dtype) * 3
    gate_up[0, :5] = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    before = gate_up.clone()
    expected = ACTIVATIONS[activation](gate_up[:, :75].double()) * gate_up[:, 75:].double()
    out = kernels.act_and_mul(gate_up[:, :75], gate_up[:, 75:], activation)
    assert out.dtype == kernels.dtype
    assert_close(out, expected, kernels.dtype)
    assert torch.equal(gate_up, before)


def test_clamped_swiglu(kernels: TorchKernels) -> None:
    gate, up = (random_tensor(seed, 20, 75, dtype=kernels.dtype) * 6 for seed in (0, 1))
    assert gate.max() > 7
    assert up.abs().max() > 7
    assert_close(kernels.act_and_mul(gate, up, "swigluoai"), clamped_swiglu(gate.double(), up.double()), kernels.dtype)


@pytest.mark.parametrize("size", [24, 100, 1000, 1536, 2816])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swigluoai"])
def test_act_and_mul_does_not_depend_on_the_batch(
    kernels: TorchKernels, num_threads: int, activation: str, size: int
) -> None:
    gate_up = random_tensor(size, 120, 2 * size, dtype=kernels.dtype)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return kernels.act_and_mul(x[:, :size], x[:, size:], activation)

    alone = torch.cat([compute(row[None].clone()) for row in gate_up])
    for rows in (2, 3, 5, 33, 64, 111, 120):
        assert torch.equal(compute(gate_up[:rows]), alone[:rows]), f"{rows} rows"


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


def test_layer_norm(kernels: TorchKernels) -> None:
    x, weight = random_tensor(1, 9, 48, dtype=kernels.dtype) + 0.5, random_tensor(2, 48, dtype=kernels.dtype)
    centered = x.double() - x.double().mean(dim=1, keepdim=True)
    expected = centered / (centered.square().mean(dim=1, keepdim=True) + 0.1).sqrt() * weight.double()
    out = kernels.layer_norm(x, weight, 0.1)
    assert_close(out, expected, kernels.dtype)
    assert all(
        torch.equal(kernels.layer_norm(row[None], weight, 0.1)[0], whole) for row, whole in zip(x, out, strict=True)
    )


def test_the_residual_stream(kernels: TorchKernels) -> None:
    """Scaled additions, additions of what is normed, and scaling with and without a soft cap, all in place."""
    dtype = kernels.dtype
    residual, x, weight = (
        random_tensor(1, 5, 24, dtype=dtype),
        random_tensor(2, 5, 24, dtype=dtype),
        random_tensor(3, 24),
    )
    weight = weight.to(dtype)
    before = residual.double()
    kernels.add(residual, x, 0.25)
    assert_close(residual, before + 0.25 * x.double(), dtype)
    before = residual.double()
    assert kernels.rms_norm(x, weight, 0.1, residual) is residual
    assert_close(residual, before + rms_norm(x, weight, 0.1), dtype)
    before = residual.double()
    kernels.scale(residual, 3.0)
    assert_close(residual, before * 3, dtype)
    logits = random_tensor(4, 5, 24) * 20
    expected = 30 * torch.tanh(logits.double() * 2 / 30)
    kernels.scale(logits, 2.0, 30.0)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-4)
