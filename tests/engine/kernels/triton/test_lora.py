"""LoRA adapters in Triton: against float64 and plain torch, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings

from engine.kernels.torch.kernels import TorchKernels
from engine.kernels.triton import lora
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.lora import COLUMNS, INPUTS, RANKS, ROWS, SPLIT_INPUTS, column_tiles
from tests.engine.kernels.triton.test_rows import assert_close
from tests.support.examples import num_examples
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, PRODUCT_DTYPES, random_tensor
from tests.support.lora_products import LoraCase, bits, check_company, lora_cases

pytestmark = ALSO_ON_A_GPU
each_dtype = pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)


def kernels_for(case: LoraCase) -> TritonKernels:
    return TritonKernels(case.options(), DEVICE)


@settings(max_examples=num_examples(4, 75), deadline=None)
@given(case=lora_cases(PRODUCT_DTYPES, max_rows=40, max_inputs=90, max_outputs=40, max_rank=10))
def test_add_lora(case: LoraCase) -> None:
    check_company(kernels_for(case), case, range(0, len(case.lora_slots), 4))


@each_dtype
def test_as_in_plain_torch(dtype: torch.dtype) -> None:
    case = LoraCase(dtype, dtype, 70, (33, 9, 17), 8, ((8, 0, 3), (1, 2, 8)), (0, 0, -1, 1, 1, 0), seed=5)
    out, expected = case.out().to(DEVICE), case.out().to(DEVICE)
    for kernels, some in (
        (kernels_for(case), out),
        (TorchKernels(case.options(), DEVICE), expected),
    ):
        lora_slots = torch.tensor(case.lora_slots, device=DEVICE)
        kernels.add_lora(case.x().to(DEVICE), some, case.weights(kernels), lora_slots)
    assert_close(out, expected)


@each_dtype
def test_beyond_one_tile(dtype: torch.dtype) -> None:
    """There are several steps and splits of the inputs, pieces of the ranks, and tiles of a projection's columns."""
    sizes, max_rank = (COLUMNS + 88, 2 * COLUMNS, 1), 2 * RANKS + 8
    ranks = ((max_rank, RANKS, 1), (RANKS + 1, 0, 33))
    case = LoraCase(dtype, dtype, SPLIT_INPUTS + INPUTS + 3, sizes, max_rank, ranks, (0, -1, 1, 0), seed=2)
    check_company(kernels_for(case), case, range(4))


@pytest.mark.parametrize("num_slots", [1, 3, ROWS + 1])
def test_tiles_of_rows(num_slots: int) -> None:
    """Adapters begin and end within tiles, and a tile may have as many as rows. The last tile is not full."""
    num_rows = 2 * ROWS + 3
    lora_slots = tuple(sorted(row % (num_slots + 1) - 1 for row in range(num_rows)))
    ranks = tuple((1 + slot % 3,) for slot in range(num_slots))
    case = LoraCase(torch.float32, torch.float32, 40, (30,), 3, ranks, lora_slots, seed=3)
    check_company(kernels_for(case), case, [0, 1, ROWS - 1, ROWS, num_rows - 2, num_rows - 1])


def test_nothing_is_launched_if_no_row_has_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LoraCase(torch.float32, torch.float32, 4, (3,), 1, ((1,),), (-1, -1), seed=0)
    kernels, x, out = kernels_for(case), case.x().to(DEVICE), case.out().to(DEVICE)
    weights = case.weights(kernels)
    monkeypatch.setattr(lora, "_shrink", None)
    kernels.add_lora(x, out, weights, torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert torch.equal(bits(out.cpu()), bits(case.out()))
    with pytest.raises(TypeError):
        kernels.add_lora(x, out, weights, torch.tensor(case.lora_slots, device=DEVICE))


def test_rows_that_do_not_lie_side_by_side() -> None:
    case = LoraCase(torch.float16, torch.float16, 40, (30, 5), 3, ((3, 1),), (0, -1, 0, 0, 0), seed=4)
    kernels = kernels_for(case)
    weights, lora_slots = case.weights(kernels), torch.tensor(case.lora_slots, device=DEVICE)
    x, out = random_tensor(1, 5, 60).half(), random_tensor(2, 5, 50).half()
    x[:, 7:47], out[:, 6:41] = case.x(), case.out()
    before = out.clone()
    kernels.add_lora(x[:, 7:47], out[:, 6:41], weights, lora_slots)
    case.check(out[:, 6:41], weights)
    assert torch.equal(bits(out[:, :6]), bits(before[:, :6]))
    assert torch.equal(bits(out[:, 41:]), bits(before[:, 41:]))


def test_tiles_are_cut_part_by_part() -> None:
    size = COLUMNS
    assert column_tiles((size, 3, size + 1), DEVICE).tolist() == [
        [0, 0, size],
        [1, size, size + 3],
        [2, size + 3, 2 * size + 4],
        [2, 2 * size + 3, 2 * size + 4],
    ]
