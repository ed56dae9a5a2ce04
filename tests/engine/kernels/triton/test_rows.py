"""Norm, activation and rotation in Triton: against float64, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import KVShape
from engine.kernels.interface import HeadNorms, KernelOptions, Rotations
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
def test_norms(size: int, dtype: torch.dtype) -> None:
    """Rows may be columns of a wider tensor, and the result may be added to a residual stream."""
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    x = random_tensor(0, 20, size + 3, dtype=dtype)[:, 2 : 2 + size]
    x *= torch.logspace(-2, 2, 20, device=DEVICE)[:, None].to(dtype)
    weight = random_tensor(1, size, dtype=dtype)
    expected_mean = torch.nn.functional.layer_norm(x.double(), (size,), weight.double(), None, 1e-5)
    for norm, expected in ((kernels.rms_norm, rms_norm(x, weight, 1e-5)), (kernels.layer_norm, expected_mean)):
        out = norm(x, weight, 1e-5)
        assert_close(out, expected)
        assert torch.equal(torch.cat([norm(row[None], weight, 1e-5) for row in x]), out)
        assert norm(x[:0], weight, 1e-5).shape == (0, size)
    wide = random_tensor(2, 20, size + 5, dtype=dtype)
    residual, before = wide[:, :size], wide.clone()
    assert kernels.rms_norm(x, weight, 1e-5, residual) is residual
    assert torch.equal(residual, before[:, :size] + kernels.rms_norm(x, weight, 1e-5))
    assert torch.equal(wide[:, size:], before[:, size:])


@each_dtype
@pytest.mark.parametrize("size", [7, 1500])
def test_sums_and_scales(size: int, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    x, wide = random_tensor(0, 6, size, dtype=dtype), random_tensor(1, 6, size + 2, dtype=dtype)
    before, residual = wide.clone(), wide[:, :size]
    kernels.add(residual, x, 0.22)
    assert_close(residual, before[:, :size].double() + 0.22 * x.double())
    kernels.scale(residual, 1.5)
    x[0, :3] = torch.tensor([-1e4, 0.0, 1e4], device=DEVICE)
    expected = 30.0 * torch.tanh(4.0 * x.double() / 30.0)
    kernels.scale(x, 4.0, 30.0)
    assert_close(x, expected)
    assert torch.equal(wide[:, size:], before[:, size:])


@each_dtype
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swigluoai"])
@pytest.mark.parametrize("size", [7, 75, 1500])
def test_act_and_mul(size: int, activation: str, dtype: torch.dtype) -> None:
    """Gate and up may be columns of one tensor, or tensors of their own."""
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    gate, up = torch.split(random_tensor(0, 6, 2 * size, dtype=dtype) * 3, size, dim=1)
    gate[0, :5] = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    out = kernels.act_and_mul(gate, up, activation)
    if activation == "swigluoai":
        g, u = gate.double().clamp(max=7), up.double().clamp(-7, 7)
        expected = g * torch.sigmoid(1.702 * g) * (u + 1)
    else:
        expected = ACTIVATIONS[activation](gate.double()) * up.double()
    assert_close(out, expected)
    pairs = zip(gate, up.contiguous(), strict=True)
    assert torch.equal(torch.cat([kernels.act_and_mul(g[None], u[None], activation) for g, u in pairs]), out)


@settings(max_examples=num_examples(5, 125), deadline=None)
@given(
    num_rows=st.integers(1, 9),
    num_heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (16, 1)]),
    head_dim=st.sampled_from([10, 16, 64, 80, 96, 256, 576]),
    block_size=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    options=st.tuples(st.sampled_from(["none", "head", "all"]), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_rope_and_store_kv(
    num_rows: int,
    num_heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    options: tuple[str, bool, bool],
    seed: int,
) -> None:
    """The cache is the second of three layers whose blocks alternate; row 0 is not stored."""
    norm, has_v_norm, values_are_keys = options
    num_kv_heads = num_heads[1]
    heads = [*num_heads, num_kv_heads]
    q, k, v = torch.split(random_tensor(seed, num_rows, sum(heads), head_dim, dtype=dtype), heads, dim=1)
    v = k if values_are_keys else v
    generator = torch.Generator().manual_seed(seed)
    tables = torch.rand(2, num_rows, head_dim, generator=generator).to(DEVICE) * 2 - 1
    rotations = Rotations(*tables)
    q_weight, k_weight, v_weight = (
        random_tensor(seed + 1 + index, head_dim * (num if norm == "all" and index < 2 else 1), dtype=dtype)
        for index, num in enumerate(heads)
    )
    has_norm = norm != "none"
    norms = HeadNorms(
        q_weight if has_norm else None, k_weight if has_norm else None, v_weight if has_v_norm else None, 1e-3
    )
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    ((other, cache, _),) = kernels.new_kv_cache([[KVShape(num_kv_heads, head_dim)] * 3], 4, block_size)
    slots = torch.randperm(4 * block_size, generator=generator)[:num_rows].to(DEVICE)
    slots[0] = -1
    rotated = kernels.rope_and_store_kv(q, k, v, rotations, slots, cache, norms)
    assert_close(rotated, rotate(normed(q, norms.q), rotations.q))
    alone = kernels.rope_and_store_kv(q, None, None, rotations, slots, cache, norms)
    assert torch.equal(alone, rotated)
    blocks, offsets = slots[1:] // block_size, slots[1:] % block_size
    assert_close(cache.keys[blocks, offsets], rotate(normed(k, norms.k), rotations.k)[1:])
    assert_close(cache.values[blocks, offsets], normed(v, norms.v)[1:])
    assert not other.keys.any()
    cache.keys[blocks, offsets] = cache.values[blocks, offsets] = 0.0
    assert not cache.keys.any()
    assert not cache.values.any()


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the RMS norm of each head, or of all together, in float64."""
    if weight is None:
        return x
    rows = x.double().reshape(-1, len(weight))
    return torch.nn.functional.rms_norm(rows, (len(weight),), weight.double(), 1e-3).view(x.shape)


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
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    slot_mapping = torch.randperm(2 * 16, generator=generator)[:6].to(DEVICE)
    slot_mapping[2] = -1  # not stored
    kernels = TritonKernels(KernelOptions(dtype, kv_cache_dtype=kv_cache_dtype), DEVICE)
    ((_, cache),) = kernels.new_kv_cache([[KVShape(num_kv_heads, head_dim)] * 2], 2, 16)
    kernels.rope_and_store_kv(q, k, v, Rotations(table, table), slot_mapping, cache)
    heads = (
        (rotate(k, table), cache.keys, cache.key_scales),
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


def rotate(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    c, s = table[:, None].double().chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)
