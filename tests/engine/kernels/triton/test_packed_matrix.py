"""Packed weights in Triton: against `gguf` and float64, and batch invariance."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.kernels.interface import KernelOptions
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.linear import linear
from engine.kernels.triton.packed_matrix import (
    READERS,
    PackedMatrix,
    from_float8,
    from_ggml,
    from_groups,
    to_int8,
)
from engine.kernels.triton.tiles import SMALLEST, TABLE, LinearTiles, Tiles
from engine.loading import load_model
from engine.weights import Float8Tensor, Weight
from tests.engine.kernels.triton.test_rows import TOLERANCES
from tests.parity.test_families import SHAPE, VOCAB_SIZE
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels
from tests.support.kernel_device import (
    ALSO_ON_A_GPU,
    DEVICE,
    HAS_FLOAT8,
    IS_INTERPRETED,
    PRODUCT_DTYPES,
    interpreted_only,
    random_tensor,
    tiles_and_dtypes,
)
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.packed_weights import inputs_of, numbers_of, random_groups, random_packed, rounded_to_int8
from tests.support.tiny_models import save_random_model

pytestmark = ALSO_ON_A_GPU
TABLES = {"smallest": SMALLEST, "9.0": TABLE[9, 0]}
FLOAT8_INPUTS = PRODUCT_DTYPES[:1] if IS_INTERPRETED else PRODUCT_DTYPES
IS_NATIVE = [False, True] if HAS_FLOAT8 else [False]
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q3_K")


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


@pytest.mark.parametrize("num_inputs", [1, 16, 31, 32, 33, 48, 100, 577])
def test_int8(num_inputs: int) -> None:
    weights = random_tensor(0, 5, num_inputs)
    matrix = to_int8(weights)
    assert (matrix.format, matrix.group) == ("int8", 32)
    assert torch.equal(matrix.rows(torch.arange(5, device=DEVICE), torch.float32).double(), rounded_to_int8(weights))
    assert not to_int8(weights[:2] * 0).rows(torch.arange(2, device=DEVICE), torch.float32).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_weight_shows(value: float) -> None:
    weights = random_tensor(0, 5, 70)
    weights[3, 40] = value
    numbers = to_int8(weights).rows(torch.arange(5, device=DEVICE), torch.float32)
    assert numbers[3, 32:64].isnan().all()
    assert numbers[3, :32].isfinite().all()
    assert numbers[[0, 1, 2, 4]].isfinite().all()


@settings(max_examples=num_examples(8, 200), deadline=None)
@given(
    name=st.sampled_from([*READERS, "int8"]),
    num_rows=st.integers(1, 70),
    num_columns=st.integers(1, 140),
    num_units=st.integers(1, 3),
    dtype=st.sampled_from(PRODUCT_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_linear(name: str, num_rows: int, num_columns: int, num_units: int, dtype: torch.dtype, seed: int) -> None:
    kernels = TritonKernels(KernelOptions(dtype, quantization="int8" if name == "int8" else "auto"), DEVICE)
    if name == "int8":
        num_inputs = 1 + seed % 90
        weights = random_tensor(seed, num_columns, num_inputs, dtype=dtype)
        matrix, numbers = kernels.pack([weights]), rounded_to_int8(weights)
    else:
        num_inputs = num_units * inputs_of(name)
        packed = random_packed(name, num_columns, num_inputs, seed)
        matrix, numbers = kernels.pack([packed]), numbers_of(packed).double().to(DEVICE)
    x = random_tensor(seed + 1, num_rows, num_inputs, dtype=dtype)
    product = kernels.linear(matrix)
    out = product(x)
    expected = x.double() @ numbers.to(dtype).double().T
    size = x.double().abs() @ numbers.abs().T
    assert ((out.double() - expected).abs() <= TOLERANCES[dtype] * size + 1e-6).all()
    rows = torch.cat([product(x[row : row + 1]) for row in range(0, num_rows, 9)])
    assert torch.equal(rows, out[::9])


@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLE, PRODUCT_DTYPES[1:]))
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "MXFP4"])
def test_linear_does_not_depend_on_the_batch(name: str, tiles: Tiles, dtype: torch.dtype) -> None:
    kernels = TritonKernels(KernelOptions(dtype), DEVICE)
    kernels.tiles = tiles
    product = kernels.linear(kernels.pack([random_packed(name, 170, 256, seed=1)]))
    x = random_tensor(2, 150, 256, dtype=dtype)
    whole = product(x)
    for num_rows in (1, 32, 33, 64, 65):
        assert torch.equal(product(x[:num_rows]), whole[:num_rows]), f"{num_rows} rows"
        assert torch.equal(product(x[150 - num_rows :]), whole[150 - num_rows :]), f"the last {num_rows} rows"


def float8_weights(num_outputs: int, num_inputs: int, scales: str, seed: int) -> tuple[Float8Tensor, Tensor]:
    """Return weights in float8, and their numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn((num_outputs, num_inputs), generator=generator).to(torch.float8_e4m3fn)
    blocks = (-(-num_outputs // 128), -(-num_inputs // 128))
    shape = {"tensor": (), "channel": (num_outputs, 1), "block": blocks}[scales]
    factors = torch.rand(shape, generator=generator) + 0.5
    spread = factors
    if scales == "block":
        spread = factors.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)[:num_outputs, :num_inputs]
    return Float8Tensor.from_scales(codes, factors), codes.double() * spread.double()


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


@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLES))
@pytest.mark.parametrize(("group", "num_inputs"), [(32, 320), (64, 384), (128, 512), (96, 288), (384, 384)])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points(tiles: Tiles, bits: int, group: int, num_inputs: int, dtype: torch.dtype) -> None:
    for symmetric in (False, True):
        weight, numbers = random_groups(bits, 70, num_inputs, group, seed=group, symmetric=symmetric)
        matrix = from_groups(weight, DEVICE)
        assert matrix.codes.nbytes == numbers.numel() * bits // 8
        assert_products(matrix, numbers.to(DEVICE), tiles.packed_linear.tiles_for(*matrix.shape), dtype, seed=1)


@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLES, FLOAT8_INPUTS))
@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
@pytest.mark.parametrize("is_native", IS_NATIVE)
def test_float8(tiles: Tiles, dtype: torch.dtype, scales: str, is_native: bool) -> None:
    for num_outputs, num_inputs in ((150, 300), (7, 100), (130, 128), (256, 200)):
        weight, numbers = float8_weights(num_outputs, num_inputs, scales, seed=num_inputs)
        matrix = from_float8(weight, DEVICE, is_native=is_native)
        assert matrix.codes.nbytes == numbers.numel()
        assert_products(matrix, numbers.to(DEVICE), tiles.packed_linear.tiles_for(*matrix.shape), dtype, seed=2)


def test_parts_of_a_layout_are_one() -> None:
    """Scales of q, k and v may be one, or one for each block of 128 rows, of which parts need not be multiples."""
    kernels = TritonKernels(KernelOptions(torch.float32), DEVICE)
    floats = [float8_weights(size, 128, "block", size) for size in (256, 128, 40, 70)]
    codes = [random_groups(4, size, 128, group, size) for size, group in [(33, 32), (9, 32), (17, 64)]]
    parts: list[tuple[Weight, Tensor]] = [
        *floats,
        float8_weights(20, 128, "tensor", 1),
        float8_weights(30, 128, "tensor", 2),
        *codes,
    ]
    matrix, numbers = kernels.pack([weight for weight, _ in parts]), torch.cat([numbers for _, numbers in parts])
    assert [len(part) for part in matrix] == [384, 110 + 50, 42, 17]
    assert kernels.formats == "weights float8, int4, KV cache float32"
    x = random_tensor(0, 9, 128)
    torch.testing.assert_close(kernels.linear(matrix)(x), x @ numbers.T.to(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_native", IS_NATIVE)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
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


@interpreted_only
def test_a_whole_model(tmp_path: Path) -> None:
    """Its answers are those of the dequantized weights, and the same alone and in a batch."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    folder = save_random_model(model, tmp_path, seed=3)
    with choose_kernels("triton"):
        loaded = load_model(EngineConfig(model_path=str(folder), device="cpu", dtype="float32", quantization="int8"))
    assert loaded.runner.kernels.formats == "weights int8, KV cache float32"
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 20, 33)]
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.copy_(rounded_to_int8(module.weight))
        for prompt in prompts:
            expected = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(all_logits(loaded, prompt), expected, rtol=0, atol=1e-3)
    together = greedy_outputs(loaded, prompts, 4)
    assert together == [greedy_outputs(loaded, [prompt], 4)[0] for prompt in prompts]
