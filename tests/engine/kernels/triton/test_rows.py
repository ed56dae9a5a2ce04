"""Norm, activation, rotation and product in Triton, in its interpreter: against float64, and promise 1 for each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import LayerCache
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.linear import linear
from engine.kernels.triton.packed import PackedMatrix, from_ggml, to_int8
from engine.kernels.triton.tiles import TABLE, LinearTiles
from tests.engine.kernels.torch.test_kernels import ACTIVATIONS, CPU, random_tensor, rms_norm
from tests.support.packed_weights import random_packed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PRODUCT_DTYPES = DTYPES[:2]  # what the interpreter makes of products in bfloat16 is wrong
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@each_dtype
@pytest.mark.parametrize("size", [1, 64, 576, 577])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    kernels = TritonKernels(CPU, dtype)
    x = random_tensor(0, 20, size, dtype=dtype) * torch.logspace(-2, 2, 20)[:, None].to(dtype)
    weight = random_tensor(1, size, dtype=dtype)
    out = kernels.rms_norm(x, weight, 1e-5)
    assert_close(out, rms_norm(x, weight, 1e-5))
    assert torch.equal(torch.cat([kernels.rms_norm(row[None], weight, 1e-5) for row in x]), out)
    assert kernels.rms_norm(x[:0], weight, 1e-5).shape == (0, size)


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [7, 75, 1500])
def test_act_and_mul(size: int, activation: str, dtype: torch.dtype) -> None:
    kernels = TritonKernels(CPU, dtype)
    gate_up = random_tensor(0, 6, 2 * size, dtype=dtype) * 3
    gate_up[0, :5] = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    out = kernels.act_and_mul(gate_up, activation)
    assert_close(out, ACTIVATIONS[activation](gate_up[:, :size].double()) * gate_up[:, size:].double())
    assert torch.equal(torch.cat([kernels.act_and_mul(row[None], activation) for row in gate_up]), out)


@settings(max_examples=25, deadline=None)
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
    angles = torch.rand(num_rows, head_dim // 2, generator=generator) * 1000
    cos, sin = angles.cos(), angles.sin()
    kernels = TritonKernels(CPU, dtype)
    cache = kernels.new_layer_cache(4, block_size, num_kv_heads, head_dim)
    slots = torch.randperm(4 * block_size, generator=generator)[:num_rows]
    rotated = kernels.rope_and_store_kv(q, k, v, cos, sin, slots, cache)
    assert_close(rotated, rotate(q, cos, sin))
    keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
    assert_close(keys[slots], rotate(k, cos, sin))
    assert torch.equal(values[slots], v)
    others = [slot for slot in range(4 * block_size) if slot not in slots]
    assert not keys[others].any()
    assert not values[others].any()


@settings(max_examples=15, deadline=None)
@given(
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([10, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_a_cache_of_8_bits(num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    """Codes of -127 .. 127, the nearest ones; each head has the scale of its largest number, whatever that is."""
    q, k, v = torch.split(random_tensor(seed, 6, 3 * num_kv_heads, head_dim, dtype=dtype), num_kv_heads, dim=1)
    k *= torch.logspace(-3, 3, 6)[:, None, None].to(dtype)
    v[1] = 0.0
    k[3, 0, 2] = torch.inf
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(6, head_dim // 2, generator=generator)
    slots = torch.randperm(2 * 16, generator=generator)[:6]
    slots[2] = -1  # nowhere
    kernels = TritonKernels(CPU, dtype, kv_cache_dtype="int8")
    cache = kernels.new_layer_cache(2, 16, num_kv_heads, head_dim)
    kernels.rope_and_store_kv(q, k, v, angles.cos(), angles.sin(), slots, cache)
    heads = (
        (rotate(k, angles.cos(), angles.sin()), cache.keys, cache.key_scales),
        (v, cache.values, cache.value_scales),
    )
    for numbers, codes, scales in heads:
        assert codes.dtype == torch.int8
        assert scales is not None
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, 16)
            of_head = scales[block, :, offset].double()
            expected = numbers[row].double()
            is_finite = expected.isfinite().all(dim=1)
            assert of_head[~is_finite].isnan().all()
            largest = expected.abs().amax(dim=1)
            torch.testing.assert_close(of_head[is_finite] * 127, largest[is_finite], rtol=1e-5, atol=0)
            errors = (codes[block, offset].double() * of_head[:, None] - expected).abs()[is_finite]
            assert (errors <= 0.501 * of_head[is_finite, None]).all()
    is_empty = torch.ones(32, dtype=torch.bool)
    is_empty[slots[slots >= 0]] = False
    assert not cache.keys.flatten(0, 1)[is_empty].any()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    c, s = cos[:, None].double(), sin[:, None].double()
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 150),
    num_columns=st.integers(1, 150),
    num_inputs=st.integers(1, 200),
    has_bias=st.booleans(),
    dtype=st.sampled_from(PRODUCT_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_linear(
    num_rows: int, num_columns: int, num_inputs: int, has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    kernels = TritonKernels(CPU, dtype)
    x, weight = random_tensor(seed, num_rows, num_inputs, dtype=dtype), random_tensor(1, num_columns, num_inputs)
    weight = (weight / num_inputs**0.5).to(dtype)
    bias = random_tensor(2, num_columns, dtype=dtype) if has_bias else None
    product = kernels.linear(kernels.pack([weight]), bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    out = product(x)
    assert_close(out, expected)
    residual = random_tensor(3, num_rows, num_columns, dtype=dtype)
    added = product(x, residual.clone())
    assert torch.equal(added, residual + out)


@pytest.mark.parametrize("tiles", TABLE.values(), ids=map(str, TABLE))
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
def test_linear_does_not_depend_on_the_batch(dtype: torch.dtype, tiles: object) -> None:
    kernels = TritonKernels(CPU, dtype)
    kernels.tiles = tiles  # type: ignore[assignment]
    product = kernels.linear(kernels.pack([random_tensor(1, 170, 300, dtype=dtype)]))
    x = random_tensor(2, 200, 300, dtype=dtype)
    whole = product(x)
    for num_rows in (1, 2, 15, 63, 64, 65, 130):
        assert torch.equal(product(x[:num_rows]), whole[:num_rows]), f"{num_rows} rows"
        assert torch.equal(product(x[200 - num_rows :]), whole[200 - num_rows :]), f"the last {num_rows} rows"


@settings(max_examples=25, deadline=None)
@given(
    splits=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 300)),
    name=st.none() | st.sampled_from(["Q4_1", "int8"]),
    adds=st.booleans(),
    has_bias=st.booleans(),
    dtype=st.sampled_from(PRODUCT_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_inputs_in_parts(
    splits: int,
    shape: tuple[int, int, int],
    name: str | None,
    adds: bool,
    has_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """A program for each part, or one for all of them: the same bits, and those of a row alone."""
    num_rows, num_columns, num_inputs = shape
    if name == "Q4_1":
        num_inputs = 32 * (1 + num_inputs // 32)
    numbers = (random_tensor(1, num_columns, num_inputs) / num_inputs**0.5).to(dtype)
    weights: Tensor | PackedMatrix = numbers
    if name is not None:
        is_int8 = name == "int8"
        weights = to_int8(numbers) if is_int8 else from_ggml(random_packed(name, num_columns, num_inputs, seed), CPU)
        numbers = weights.rows(torch.arange(num_columns), dtype)
    x = random_tensor(seed, num_rows, num_inputs, dtype=dtype)
    bias = random_tensor(2, num_columns, dtype=dtype) if has_bias else None
    start = random_tensor(3, num_rows, num_columns, dtype=dtype)

    def product(programs: int, first: int = 0, last: int = num_rows) -> Tensor:
        out = start[first:last].clone()
        tiles = LinearTiles(32, 64, 32, 4, 2, programs=programs, splits=splits)
        linear(x[first:last], weights, bias, tiles, out, adds=adds)
        return out

    out = product(programs=0)
    assert torch.equal(product(programs=10**6), out)
    assert torch.equal(product(10**6, num_rows - 1), out[num_rows - 1 :])
    expected = x.double() @ numbers.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ numbers.double().abs().T + 2
    assert ((out.double() - expected - (start.double() if adds else 0)).abs() <= TOLERANCES[dtype] * size).all()


def test_tiles_of_shapes() -> None:
    """Of Llama-3-8B and SmolLM2 on an H100."""
    expected = {
        (6144, 4096): (128, 2),
        (4096, 4096): (128, 4),
        (28672, 4096): (128, 1),
        (4096, 14336): (128, 4),
        (128256, 4096): (128, 1),
        (960, 576): (64, 1),
        (576, 1536): (64, 1),
    }
    for shape, (columns, splits) in expected.items():
        tiles = TABLE[9, 0].linear_for(*shape)
        assert (tiles.columns, tiles.splits) == (columns, splits), shape


def test_a_cache_without_scales() -> None:
    cache = TritonKernels(CPU, torch.float16).new_layer_cache(2, 16, 1, 16)
    assert isinstance(cache, LayerCache)
    assert cache.key_scales is None
