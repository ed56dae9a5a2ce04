"""LoRA adapters in Triton's interpreter: against float64 and plain torch, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings

from engine.kernels.torch.kernels import TorchKernels
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.lora import EXPAND_COLUMNS, EXPAND_RANKS, ROWS_PER_GROUP, SHRINK_INPUTS, column_tiles
from tests.engine.kernels.triton.test_rows import DTYPES, assert_close, each_dtype
from tests.support.examples import num_examples
from tests.support.lora_products import LoraCase, bits, check_company, lora_cases
from tests.support.tensors import CPU, random_tensor


def kernels_for(case: LoraCase) -> TritonKernels:
    return TritonKernels(case.options(), CPU)


@settings(max_examples=num_examples(4, 75), deadline=None)
@given(case=lora_cases(DTYPES, max_rows=40, max_inputs=90, max_outputs=40, max_rank=10))
def test_add_lora(case: LoraCase) -> None:
    check_company(kernels_for(case), case, range(0, len(case.lora_slots), 4))


@each_dtype
def test_as_in_plain_torch(dtype: torch.dtype) -> None:
    case = LoraCase(dtype, dtype, 70, (33, 9, 17), 8, ((8, 0, 3), (1, 2, 8)), (0, 0, -1, 1, 1, 0), seed=5)
    out, expected = case.out(), case.out()
    for kernels, some in (
        (kernels_for(case), out),
        (TorchKernels(case.options(), CPU), expected),
    ):
        kernels.add_lora(case.x(), some, case.weights(kernels), torch.tensor(case.lora_slots))
    assert_close(out, expected)


@each_dtype
def test_beyond_one_tile(dtype: torch.dtype) -> None:
    """There are several tiles of inputs, of ranks, and of the columns of a projection."""
    sizes, max_rank = (EXPAND_COLUMNS + 88, 2 * EXPAND_COLUMNS, 1), 2 * EXPAND_RANKS + 8
    ranks = ((max_rank, EXPAND_RANKS, 1), (EXPAND_RANKS + 1, 0, 33))
    case = LoraCase(dtype, dtype, 2 * SHRINK_INPUTS + 3, sizes, max_rank, ranks, (0, -1, 1, 0), seed=2)
    check_company(kernels_for(case), case, range(4))


@pytest.mark.parametrize("num_rows", [2 * ROWS_PER_GROUP, 3 * ROWS_PER_GROUP + 2])
def test_many_rows_are_taken_in_groups(num_rows: int) -> None:
    lora_slots = tuple(row % 3 - 1 for row in range(num_rows))
    case = LoraCase(torch.float32, torch.float32, 40, (30,), 3, ((3,), (2,)), lora_slots, seed=3)
    check_company(kernels_for(case), case, [0, 1, 2, num_rows - 2, num_rows - 1])


def test_rows_that_do_not_lie_side_by_side() -> None:
    case = LoraCase(torch.float16, torch.float16, 40, (30, 5), 3, ((3, 1),), (0, -1, 0, 0, 0), seed=4)
    kernels = kernels_for(case)
    weights, lora_slots = case.weights(kernels), torch.tensor(case.lora_slots)
    x, out = random_tensor(1, 5, 60).half(), random_tensor(2, 5, 50).half()
    x[:, 7:47], out[:, 6:41] = case.x(), case.out()
    before = out.clone()
    kernels.add_lora(x[:, 7:47], out[:, 6:41], weights, lora_slots)
    case.check(out[:, 6:41], weights)
    assert torch.equal(bits(out[:, :6]), bits(before[:, :6]))
    assert torch.equal(bits(out[:, 41:]), bits(before[:, 41:]))


def test_no_rows() -> None:
    case = LoraCase(torch.float32, torch.float32, 4, (3,), 1, ((1,),), (), seed=0)
    kernels = kernels_for(case)
    kernels.add_lora(case.x(), case.out(), case.weights(kernels), torch.empty(0, dtype=torch.int64))


def test_tiles_are_cut_part_by_part() -> None:
    size = EXPAND_COLUMNS
    assert column_tiles((size, 3, size + 1), CPU).tolist() == [
        [0, 0, size],
        [1, size, size + 3],
        [2, size + 3, 2 * size + 4],
        [2, 2 * size + 3, 2 * size + 4],
    ]
