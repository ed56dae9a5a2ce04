"""Products in Triton, of plain and packed weights: against `gguf` and float64, and batch invariance."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import KernelOptions
from engine.parts.quantized.weights import Float8Tensor
from engine.parts.triton.float8 import float8_bits
from engine.parts.triton.kernels import TritonKernels
from engine.parts.triton.linear import linear
from engine.parts.triton.packed_matrix import READERS, PackedMatrix, from_float8, from_ggml, from_groups, to_int8
from engine.parts.triton.tiles import MAX_SPLIT_SUMS, SMALLEST, TABLE, LinearTable, LinearTile, LinearTiles, Tiles
from tests.support.examples import num_examples, star
from tests.support.kernel_device import (
    ALSO_ON_A_GPU,
    DEVICE,
    HAS_FLOAT8,
    IS_INTERPRETED,
    PRODUCT_DTYPES,
    TOLERANCES,
    random_tensor,
    tiles_and_dtypes,
)
from tests.support.packed_weights import inputs_of, numbers_of, random_groups, random_packed, rounded_to_int8
from tests.support.quantized_files import float8

pytestmark = ALSO_ON_A_GPU
TABLES = {"smallest": SMALLEST, "9.0": TABLE[9, 0]}
FLOAT8_INPUTS = PRODUCT_DTYPES[:1] if IS_INTERPRETED else PRODUCT_DTYPES
IS_NATIVE = [False, True] if HAS_FLOAT8 else [False]
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q3_K")


def tiles_of_products(dtypes: Sequence[torch.dtype]) -> list[list[Any]]:
    return [[*some.values] for some in tiles_and_dtypes(TABLES, dtypes)]


# How weights are packed.


@pytest.mark.parametrize("name", READERS)
def test_packed_weights_stand_for_the_same_numbers(name: str) -> None:
    unit = inputs_of(name)
    for num_rows, num_inputs in ((1, unit), (7, 3 * unit)):
        packed = random_packed(name, num_rows, num_inputs, seed=num_rows)
        matrix = from_ggml(packed, DEVICE)
        assert (len(matrix), matrix.num_inputs) == (num_rows, num_inputs)
        assert (matrix.format, matrix.codes.nbytes) == (
            ("int4" if name in FOUR_BITS else "float4", num_rows * num_inputs // 2)
            if name in (*FOUR_BITS, "MXFP4")
            else ("int8", num_rows * num_inputs)
        )
        expected = numbers_of(packed).to(DEVICE)
        numbers = matrix.rows(torch.arange(num_rows, device=DEVICE), torch.float32)
        torch.testing.assert_close(numbers, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(matrix.rows(torch.tensor([num_rows - 1], device=DEVICE), torch.float16), numbers[-1:].half())


def test_int8() -> None:
    rows = torch.arange(5, device=DEVICE)
    for num_inputs in (1, 16, 31, 32, 33, 48, 100, 577):
        weights = random_tensor(0, 5, num_inputs)
        matrix = to_int8(weights)
        assert (matrix.format, matrix.group) == ("int8", 32)
        assert torch.equal(matrix.rows(rows, torch.float32).double(), rounded_to_int8(weights))
        assert not to_int8(weights * 0).rows(rows, torch.float32).any()
    kernels = TritonKernels(KernelOptions(torch.float32, quantization="int8"), DEVICE)
    assert [type(part) for part in kernels.pack([random_tensor(0, 5, 64)])] == [PackedMatrix]
    assert kernels.formats == "weights int8, KV cache float32"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_weight_shows(value: float) -> None:
    weights = random_tensor(0, 5, 70)
    weights[3, 40] = value
    numbers = to_int8(weights).rows(torch.arange(5, device=DEVICE), torch.float32)
    assert numbers[3, 32:64].isnan().all()
    assert numbers[3, :32].isfinite().all()
    assert numbers[[0, 1, 2, 4]].isfinite().all()


# Products.


Case = tuple[int, tuple[int, int, int], str, bool, bool, torch.dtype, int]
cases = st.tuples(
    st.integers(1, 4),  # splits
    st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 600)),  # rows, columns and inputs
    st.sampled_from(["plain", "int8", *READERS]),
    st.booleans(),  # whether it adds to what is there
    st.booleans(),  # whether it has a bias
    st.sampled_from(PRODUCT_DTYPES),
    st.integers(0, 2**32),
)


@settings(max_examples=num_examples(1, 30), deadline=None)
@example((3, (40, 70, 300), "plain", True, True, PRODUCT_DTYPES[-1], 1))
@example((2, (20, 70, 300), "Q4_K", False, True, PRODUCT_DTYPES[-1], 1))
@example((1, (20, 70, 300), "Q6_K", False, False, PRODUCT_DTYPES[-1], 2))
@example((1, (20, 70, 100), "MXFP4", True, False, PRODUCT_DTYPES[-1], 3))
@example((2, (20, 70, 100), "int8", False, False, PRODUCT_DTYPES[-1], 4))
@given(cases)
def test_product(case: Case) -> None:
    """The bits are the same for one program for each split of the inputs or one for all of them, and for fewer rows."""
    splits, (num_rows, num_columns, num_inputs), name, adds, has_bias, dtype, seed = case
    unit = inputs_of(name)
    num_inputs = -(-num_inputs // unit) * unit
    numbers = (random_tensor(1, num_columns, num_inputs) / num_inputs**0.5).to(dtype)
    weights: Tensor | PackedMatrix = numbers
    if name != "plain":
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
    assert torch.equal(product(0, num_rows // 2), out[num_rows // 2 :])
    expected = x.double() @ numbers.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ numbers.double().abs().T + 2
    assert ((out.double() - expected - (start.double() if adds else 0)).abs() <= TOLERANCES[dtype] * size).all()


@pytest.mark.long
@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLE, PRODUCT_DTYPES[1:]))
def test_tiles_of_all_cards(tiles: Tiles, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    kernels.tiles = tiles
    for name in ("plain", "Q6_K"):
        weight = random_tensor(1, 170, 256, dtype=dtype) if name == "plain" else random_packed(name, 170, 256, seed=1)
        product = kernels.linear(kernels.pack([weight]))
        x = random_tensor(2, 150, 256, dtype=dtype)
        whole = product(x)
        for num_rows in (1, 32, 33, 64, 65, 130):
            some = slice(num_rows) if num_rows % 2 else slice(150 - num_rows, None)
            assert torch.equal(product(x[some]), whole[some]), f"{num_rows} rows"


def float8_weights(num_outputs: int, num_inputs: int, scales: str, seed: int) -> tuple[Float8Tensor, Tensor]:
    """Return weights in float8, and their numbers in float64."""
    tensors, numbers = float8(np.random.default_rng(seed), num_outputs, num_inputs, scales, "scales")
    return Float8Tensor.from_scales(tensors["weight"], tensors["scales"]), torch.from_numpy(numbers).double()


def assert_products(matrix: PackedMatrix, numbers: Tensor, tiles: LinearTiles, dtype: torch.dtype, seed: int) -> None:
    """Compare products of 1 and 40 rows with float64, and the bits of the rows with each other."""
    assert torch.equal(matrix.rows(torch.arange(len(matrix), device=DEVICE), torch.float32), numbers.float())
    x = random_tensor(seed, 40, matrix.num_inputs, dtype=dtype)
    out = torch.empty(40, len(matrix), dtype=dtype, device=DEVICE)
    last = torch.empty_like(out[:1])
    linear(x, matrix, None, tiles, out)
    linear(x[-1:], matrix, None, tiles, last)
    assert torch.equal(last, out[-1:])
    size = x.double().abs() @ numbers.abs().T
    difference = (out.double() - x.double() @ numbers.to(dtype).double().T).abs()
    assert (difference <= TOLERANCES[dtype] * size + 1e-6).all()


@pytest.mark.parametrize(
    ("bits", "sizes", "tiles_and_dtype"),
    star([4, 8], [[64, 384], [32, 320], [128, 512], [96, 288], [384, 384]], tiles_of_products(PRODUCT_DTYPES)),
)
def test_zero_points(bits: int, sizes: list[int], tiles_and_dtype: list[Any]) -> None:
    (group, num_inputs), (tiles, dtype) = sizes, tiles_and_dtype
    for symmetric in (False, True):
        weight, numbers = random_groups(bits, 70, num_inputs, group, seed=group, symmetric=symmetric)
        matrix = from_groups(weight, DEVICE)
        assert matrix.codes.nbytes == numbers.numel() * bits // 8
        assert_products(matrix, numbers.to(DEVICE), tiles.packed_linear.tiles_for(*matrix.shape), dtype, seed=1)


@pytest.mark.parametrize(
    ("scales", "is_native", "tiles_and_dtype"),
    star(["block", "tensor", "channel"], IS_NATIVE, tiles_of_products(FLOAT8_INPUTS)),
)
def test_float8(scales: str, is_native: bool, tiles_and_dtype: list[Any]) -> None:
    tiles, dtype = tiles_and_dtype
    for num_outputs, num_inputs in ((150, 300), (7, 100), (130, 128), (256, 200)):
        weight, numbers = float8_weights(num_outputs, num_inputs, scales, seed=num_inputs)
        matrix = from_float8(weight, DEVICE, is_native=is_native)
        assert matrix.codes.nbytes == numbers.numel()
        assert_products(matrix, numbers.to(DEVICE), tiles.packed_linear.tiles_for(*matrix.shape), dtype, seed=2)


@pytest.mark.parametrize(("is_native", "dtype"), star(IS_NATIVE, PRODUCT_DTYPES), ids=str)
def test_all_numbers_of_float8(is_native: bool, dtype: torch.dtype) -> None:
    """The product with 1 is each of the 256 numbers: subnormal, negative zero and NaN too."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    if is_native and IS_INTERPRETED:  # its conversion knows no NaN
        codes = codes.view(torch.uint8)[~codes.float().isnan()].view(torch.float8_e4m3fn)
    weight = Float8Tensor.from_scales(codes[:, None].contiguous().cpu(), torch.ones(()))
    matrix = from_float8(weight, DEVICE, is_native=is_native)
    out = torch.empty(1, len(codes), dtype=dtype, device=DEVICE)
    x = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    linear(x, matrix, None, SMALLEST.packed_linear.tiles_for(len(codes), 1), out)
    torch.testing.assert_close(out[0], codes.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_parts_of_several_types_with_bias_and_residual() -> None:
    kernels = TritonKernels(KernelOptions(torch.float32), DEVICE)
    parts = [random_packed(name, size, 256, size) for name, size in [("Q4_1", 33), ("Q4_1", 9), ("Q6_K", 17)]]
    matrix, numbers = kernels.pack(parts), torch.cat([numbers_of(part) for part in parts]).to(DEVICE)
    assert [len(part) for part in matrix] == [42, 17]
    assert kernels.formats == "weights q4_1, q6_k, KV cache float32"
    x, bias, residual = random_tensor(0, 9, 256), random_tensor(1, 59), random_tensor(2, 9, 59)
    out = kernels.linear(matrix, bias)(x, residual.clone())
    torch.testing.assert_close(out, residual + x @ numbers.T + bias, rtol=1e-4, atol=1e-4)


def test_a_part_that_is_not_packed() -> None:
    kernels = TritonKernels(KernelOptions(torch.float32), DEVICE)
    packed, plain = random_packed("Q5_1", 40, 64, 1), random_tensor(2, 20, 64).cpu()
    (matrix,) = kernels.pack([packed, plain])
    assert isinstance(matrix, Tensor)
    assert torch.equal(matrix, torch.cat([numbers_of(packed), plain]).to(DEVICE))


# Bits of float8 e4m3.


@triton.jit  # type: ignore[untyped-decorator]
def _encode(numbers, codes, size: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, size)
    tl.store(codes + index, float8_bits(tl.load(numbers + index)))


def test_numbers_halfway_between_codes() -> None:
    """Of two codes that are equally near, the even one is chosen; larger numbers become the largest."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[:-1] + codes[1:]) / 2
    around = (halfway, halfway.nextafter(torch.tensor(0.0)), halfway.nextafter(torch.tensor(1e9)), codes)
    numbers = torch.cat([sign * some for some in around for sign in (1, -1)])
    assert torch.equal(encoded(numbers).view(torch.float8_e4m3fn).float(), numbers.to(torch.float8_e4m3fn).float())
    found = encoded(torch.tensor([449.0, -1e30, 463.0, 5.0]))
    assert found.view(torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 448.0, 5.0]


def encoded(numbers: torch.Tensor) -> torch.Tensor:
    size = triton.next_power_of_2(len(numbers))
    padded = torch.nn.functional.pad(numbers, (0, size - len(numbers))).to(DEVICE)
    codes = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    _encode[(1,)](padded, codes, size)
    return codes[: len(numbers)].cpu()


# Tiles of products, by card, shape of the weights and number of rows.


# Weights of Llama-3-8B and -70B, Llama-3.2-1B and SmolLM2: outputs and inputs.
WEIGHTS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
WEIGHTS += [(10240, 8192), (57344, 8192), (3072, 2048), (2048, 8192), (960, 576), (576, 1536)]
LINEAR_TABLES = [
    pytest.param(table, id=f"{card} {kind}")
    for card, tiles in TABLE.items()
    for kind, table in (("plain", tiles.linear), ("packed", tiles.packed_linear))
]


@pytest.mark.parametrize("table", LINEAR_TABLES)
def test_tiles_fill_the_card(table: LinearTable) -> None:
    """Those that follow the smallest are enough, or follow one that is too narrow; many rows have the largest."""
    for shape in WEIGHTS:
        tiles = table.tiles_for(*shape)
        starts = [first for first, _ in tiles.tiles]
        assert starts == sorted(set(starts))
        assert starts[0] == 1
        for first, tile in tiles.tiles[1:]:
            num_tiles = -(-first // tile.rows) * -(-shape[0] // tile.columns)
            assert num_tiles * tiles.splits >= table.programs or first == 33
        widest = [tile for tile in table.tiles if tiles.splits == 1 or tile.sums_per_thread <= MAX_SPLIT_SUMS]
        assert tiles.tile_for(10**5) == widest[-1]
        # Only weights with few outputs are split.
        num_tiles = -(-shape[0] // table.tiles[0].columns)
        assert tiles.splits == 1 or num_tiles * tiles.splits // 2 < table.programs
        assert num_tiles * tiles.splits >= table.programs or shape[1] < 2048 * tiles.splits
        assert tiles.splits == 1 or shape[1] >= 1024 * tiles.splits
