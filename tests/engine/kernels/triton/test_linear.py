"""The product in Triton: against float64, and batch invariance."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import KernelOptions
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.linear import linear
from engine.kernels.triton.packed_matrix import PackedMatrix, from_ggml, to_int8
from engine.kernels.triton.tiles import TABLE, LinearTile, LinearTiles, Tiles, tiles_for
from tests.engine.kernels.triton.test_rows import TOLERANCES, assert_close
from tests.support.examples import num_examples
from tests.support.kernel_device import (
    ALSO_ON_A_GPU,
    CAPABILITY,
    DEVICE,
    IS_INTERPRETED,
    PRODUCT_DTYPES,
    random_tensor,
    tiles_and_dtypes,
)
from tests.support.packed_weights import random_packed

pytestmark = ALSO_ON_A_GPU


@settings(max_examples=num_examples(5, 125), deadline=None)
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
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
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


@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLE))
def test_linear_does_not_depend_on_the_batch(tiles: Tiles, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    kernels.tiles = tiles
    product = kernels.linear(kernels.pack([random_tensor(1, 170, 300, dtype=dtype)]))
    x = random_tensor(2, 200, 300, dtype=dtype)
    whole = product(x)
    for num_rows in (1, 2, 32, 33, 64, 65, 130):
        assert torch.equal(product(x[:num_rows]), whole[:num_rows]), f"{num_rows} rows"
        assert torch.equal(product(x[200 - num_rows :]), whole[200 - num_rows :]), f"the last {num_rows} rows"


def all_tiles() -> set[LinearTile]:
    """Return the tiles of all cards that add up in steps of 64 inputs; on a GPU those that it has."""
    if not IS_INTERPRETED:
        return set(tiles_for(CAPABILITY, torch.float16).linear.tiles)
    tables = [table for tiles in TABLE.values() for table in (tiles.linear, tiles.packed_linear)]
    return {replace(tile, num_warps=4, num_stages=2) for table in tables if table.inputs == 64 for tile in table.tiles}


# On a GPU, float32 has one tile.
@pytest.mark.parametrize(
    ("dtype", "splits"),
    [(torch.float32, 1), (torch.float16, 3)] if IS_INTERPRETED else [(torch.bfloat16, 1), (torch.float16, 3)],
)
def test_all_tiles_give_the_same_bits(dtype: torch.dtype, splits: int) -> None:
    tiles = all_tiles()
    assert len(tiles) > 3
    x, weight = random_tensor(1, 70, 300, dtype=dtype), random_tensor(2, 140, 300, dtype=dtype)
    bias = random_tensor(3, 140, dtype=dtype)
    results = []
    for tile in tiles:
        for programs in (0, 10**6):
            results.append(torch.empty(70, 140, dtype=dtype, device=DEVICE))
            linear(x, weight, bias, LinearTiles(64, programs, ((1, tile),), splits), results[-1])
    assert all(torch.equal(result, results[0]) for result in results)
    assert_close(results[0], x.double() @ weight.double().T + bias.double())


@settings(max_examples=num_examples(5, 125), deadline=None)
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
    """The bits are the same for one program for each split or one for all of them, and for a row alone."""
    num_rows, num_columns, num_inputs = shape
    if name == "Q4_1":
        num_inputs = 32 * (1 + num_inputs // 32)
    numbers = (random_tensor(1, num_columns, num_inputs) / num_inputs**0.5).to(dtype)
    weights: Tensor | PackedMatrix = numbers
    if name is not None:
        is_int8 = name == "int8"
        weights = to_int8(numbers) if is_int8 else from_ggml(random_packed(name, num_columns, num_inputs, seed), DEVICE)
        numbers = weights.rows(torch.arange(num_columns, device=DEVICE), dtype)
    x = random_tensor(seed, num_rows, num_inputs, dtype=dtype)
    bias = random_tensor(2, num_columns, dtype=dtype) if has_bias else None
    start = random_tensor(3, num_rows, num_columns, dtype=dtype)

    def product(programs: int, first: int = 0, last: int = num_rows) -> Tensor:
        out = start[first:last].clone()
        tiles = LinearTiles(32, programs, ((1, LinearTile(32, 64, 4, 2)),), splits)
        linear(x[first:last], weights, bias, tiles, out, adds=adds)
        return out

    out = product(programs=0)
    assert torch.equal(product(programs=10**6), out)
    assert torch.equal(product(10**6, num_rows - 1), out[num_rows - 1 :])
    expected = x.double() @ numbers.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ numbers.double().abs().T + 2
    assert ((out.double() - expected - (start.double() if adds else 0)).abs() <= TOLERANCES[dtype] * size).all()
