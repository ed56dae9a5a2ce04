"""Norm, activation and rotation in Triton: against float64, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import KernelOptions, LayerCache
from engine.kernels.triton.kernels import TritonKernels
from tests.support.examples import num_examples
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, HAS_FLOAT8, IS_INTERPRETED, random_tensor
from tests.support.tensors import ACTIVATIONS, rms_norm

pytestmark = ALSO_ON_A_GPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn if HAS_FLOAT8 and not IS_INTERPRETED else torch.uint8  # its bits
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@each_dtype
@pytest.mark.parametrize("size", [1, 64, 576, 577])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    x = random_tensor(0, 20, size, dtype=dtype) * torch.logspace(-2, 2, 20, device=DEVICE)[:, None].to(dtype)
    weight = random_tensor(1, size, dtype=dtype)
    out = kernels.rms_norm(x, weight, 1e-5)
    assert_close(out, rms_norm(x, weight, 1e-5))
    assert torch.equal(torch.cat([kernels.rms_norm(row[None], weight, 1e-5) for row in x]), out)
    assert kernels.rms_norm(x[:0], weight, 1e-5).shape == (0, size)


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [7, 75, 1500])
def test_act_and_mul(size: int, activation: str, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    gate_up = random_tensor(0, 6, 2 * size, dtype=dtype) * 3
    gate_up[0, :5] = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    out = kernels.act_and_mul(gate_up, activation)
    assert_close(out, ACTIVATIONS[activation](gate_up[:, :size].double()) * gate_up[:, size:].double())
    assert torch.equal(torch.cat([kernels.act_and_mul(row[None], activation) for row in gate_up]), out)


@settings(max_examples=num_examples(5, 125), deadline=None)
@given(
    num_rows=st.integers(1, 9),
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 16]),
    head_dim=st.sampled_from([10, 16, 64, 80, 96, 256]),
    block_size=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_rope_and_store_kv(
    num_rows: int, num_kv_heads: int, group_size: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    heads = [num_kv_heads * group_size, num_kv_heads, num_kv_heads]
    q, k, v = torch.split(random_tensor(seed, num_rows, sum(heads), head_dim, dtype=dtype), heads, dim=1)
    generator = torch.Generator().manual_seed(seed)
    angles = (torch.rand(num_rows, head_dim // 2, generator=generator) * 1000).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    (cache,) = kernels.new_kv_cache(1, 4, block_size, num_kv_heads, head_dim)
    slot_mapping = torch.randperm(4 * block_size, generator=generator)[:num_rows].to(DEVICE)
    rotated = kernels.rope_and_store_kv(q, k, v, cos, sin, slot_mapping, cache)
    assert_close(rotated, rotate(q, cos, sin))
    keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
    assert_close(keys[slot_mapping], rotate(k, cos, sin))
    assert torch.equal(values[slot_mapping], v)
    others = [slot for slot in range(4 * block_size) if slot not in slot_mapping]
    assert not keys[others].any()
    assert not values[others].any()


@settings(max_examples=num_examples(4, 75), deadline=None)
@given(
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([10, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    kv_cache_dtype=st.sampled_from(["int8", "fp8"]),
    seed=st.integers(0, 2**32),
)
def test_a_cache_of_8_bits(
    num_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_cache_dtype: str, seed: int
) -> None:
    """Codes are the nearest in -127 .. 127, or in float8; the scale of a head is that of its largest number."""
    q, k, v = torch.split(random_tensor(seed, 6, 3 * num_kv_heads, head_dim, dtype=dtype), num_kv_heads, dim=1)
    k *= torch.logspace(-3, 3, 6, device=DEVICE)[:, None, None].to(dtype)
    v[1] = 0.0
    k[3, 0, 2] = torch.inf
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(6, head_dim // 2, generator=generator).to(DEVICE)
    slot_mapping = torch.randperm(2 * 16, generator=generator)[:6].to(DEVICE)
    slot_mapping[2] = -1  # not stored
    kernels = TritonKernels(KernelOptions(dtype, kv_cache_dtype=kv_cache_dtype), DEVICE)
    (cache,) = kernels.new_kv_cache(1, 2, 16, num_kv_heads, head_dim)
    kernels.rope_and_store_kv(q, k, v, angles.cos(), angles.sin(), slot_mapping, cache)
    heads = (
        (rotate(k, angles.cos(), angles.sin()), cache.keys, cache.key_scales),
        (v, cache.values, cache.value_scales),
    )
    for numbers, stored, scales in heads:
        assert stored.dtype == (torch.int8 if kv_cache_dtype == "int8" else FLOAT8)
        assert scales is not None
        codes = stored if kv_cache_dtype == "int8" else stored.view(torch.float8_e4m3fn)
        for row, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, 16)
            of_head = scales[block, :, offset].double()
            expected = numbers[row].double()
            is_finite = expected.isfinite().all(dim=1)
            assert of_head[~is_finite].isnan().all()
            largest = expected.abs().amax(dim=1)
            torch.testing.assert_close(
                of_head[is_finite] * (127 if kv_cache_dtype == "int8" else 448), largest[is_finite], rtol=1e-5, atol=0
            )
            errors = (codes[block, offset].double() * of_head[:, None] - expected).abs()[is_finite]
            bounds = 0.501 * of_head[is_finite, None].expand_as(errors)  # half of the step between codes
            if kv_cache_dtype == "fp8":
                bounds = torch.maximum(bounds * 2**-9, 1.001 * 2**-4 * expected.abs()[is_finite])
            assert (errors <= bounds).all()
    is_empty = torch.ones(32, dtype=torch.bool, device=DEVICE)
    is_empty[slot_mapping[slot_mapping >= 0]] = False
    assert not cache.keys.view(torch.uint8).flatten(0, 1)[is_empty].any()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    c, s = cos[:, None].double(), sin[:, None].double()
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def test_a_cache_without_scales() -> None:
    (cache,) = TritonKernels(KernelOptions(torch.float16), DEVICE).new_kv_cache(1, 2, 16, 1, 16)
    assert isinstance(cache, LayerCache)
    assert cache.key_scales is None
