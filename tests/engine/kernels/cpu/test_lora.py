"""LoRA adapters in C++: against float64, and batch invariance."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.kernels.interface import KernelOptions, LoraWeights
from tests.support.kernel_choice import code_paths
from tests.support.recorded_kernels import MAX_ROWS, Rows, assert_close, make_kernels
from tests.support.tensors import random_tensor

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
each_code_path = pytest.mark.parametrize("code_path", code_paths())
each_number_of_threads = pytest.mark.parametrize("num_threads", [1, 2])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

NUM_SLOTS = 3
MAX_RANK = 9
SHAPES = [((70,), 100), ((576, 192, 192), 576), ((1, 33, 5), 31), ((600, 600), 16), ((1,), 1)]  # outputs, inputs
ROUNDING = 1e-6  # of a sum in float32, relative to the sum of the absolute values


class Adapted:
    """Adds the adapters of rows of `x` to rows of `base`. Row i has the adapter in slot i % (slots + 1) - 1."""

    def __init__(self, code_path: str, num_threads: int, dtype: torch.dtype, sizes: tuple[int, ...], size: int) -> None:
        options = KernelOptions(dtype, num_lora_slots=NUM_SLOTS, max_lora_rank=MAX_RANK)
        kernels = make_kernels(code_path, num_threads, options)
        weights = kernels.new_lora_weights(sizes, size)
        assert weights is not None
        self.weights = weights
        fill(weights)
        self.x, self.base = random_tensor(1, MAX_ROWS, size), random_tensor(2, MAX_ROWS, sum(sizes))
        self.slot_of = torch.arange(MAX_ROWS) % (NUM_SLOTS + 1) - 1
        self.lora_slots = torch.full((MAX_ROWS,), NUM_SLOTS + 7)  # must not be read after the last row

        def operation(rows: Tensor, x: Tensor, base: Tensor) -> Tensor:
            kernels.add_lora(x, base, weights, self.lora_slots)
            return base

        self.rows = Rows(kernels, [self.x, self.base], operation)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        self.lora_slots.fill_(NUM_SLOTS + 7)
        self.lora_slots[: len(rows)] = self.slot_of[list(rows)]
        return self.rows(rows)


def fill(weights: LoraWeights) -> None:
    """Fill slots with random matrices of all ranks, and with NaN elsewhere."""
    generator = torch.Generator().manual_seed(5)
    weights.a.fill_(torch.nan)
    weights.b.fill_(torch.nan)
    weights.ranks.copy_(torch.arange(weights.ranks.numel()).view_as(weights.ranks) * 4 % (MAX_RANK + 1))
    ends = torch.tensor(weights.sizes).cumsum(0).tolist()
    for slot, ranks in enumerate(weights.ranks.tolist()):
        for part, rank in enumerate(ranks):
            first = ends[part] - weights.sizes[part]
            weights.a[slot, part, :rank] = torch.randn((rank, weights.a.shape[3]), generator=generator)
            weights.b[slot, :rank, first : ends[part]] = torch.randn((rank, weights.sizes[part]), generator=generator)


@each_number_of_threads
@each_code_path
@each_dtype
@pytest.mark.parametrize(("sizes", "size"), SHAPES, ids=str)
def test_against_float64(
    sizes: tuple[int, ...], size: int, dtype: torch.dtype, code_path: str, num_threads: int
) -> None:
    adapted = Adapted(code_path, num_threads, dtype, sizes, size)
    out = adapted(range(MAX_ROWS))
    weights, x = adapted.weights, adapted.x.double()
    expected, bound = adapted.base.double(), adapted.base.double().abs()
    for row, slot in enumerate(adapted.slot_of.tolist()):
        if slot < 0:
            assert torch.equal(out[row], adapted.base[row])
            continue
        first = 0
        for part, part_size in enumerate(weights.sizes):
            rank, columns = int(weights.ranks[slot, part]), slice(first, first + part_size)
            a, b = weights.a[slot, part, :rank].double(), weights.b[slot, :rank, columns].double()
            expected[row, columns] += x[row] @ a.T @ b
            bound[row, columns] += x[row].abs() @ a.abs().T @ b.abs()
            if not rank:
                assert torch.equal(out[row, columns], adapted.base[row, columns])
            first += part_size
    assert_close(out, expected, ROUNDING * bound + 1e-30)


@each_number_of_threads
@each_code_path
@each_dtype
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, code_path: str, num_threads: int) -> None:
    adapted = Adapted(code_path, num_threads, dtype, (576, 192, 192), 576)
    everything = adapted(range(MAX_ROWS))
    for num in (1, 2, 3, 4, 5, 7, 8, 12, 33):
        some = torch.randperm(MAX_ROWS, generator=torch.Generator().manual_seed(num))[:num].tolist()
        assert torch.equal(adapted(some), everything[some]), f"{num} rows"
        alike = list(range(1, MAX_ROWS, NUM_SLOTS + 1))[:num]  # rows of one adapter, which share its matrices
        assert torch.equal(adapted(alike), everything[alike]), f"{num} rows of one adapter"


@each_code_path
def test_without_slots_there_is_nothing_to_add(code_path: str) -> None:
    assert make_kernels(code_path).new_lora_weights((4,), 4) is None
