"""LoRA adapters in plain torch: against NumPy in float64, and batch invariance."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.interface import KernelOptions
from engine.kernels.torch import lora
from engine.kernels.torch.kernels import TorchKernels
from tests.support.examples import num_examples
from tests.support.lora_products import LoraCase, bits, check_company, lora_cases
from tests.support.tensors import CPU

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels_for(case: LoraCase) -> TorchKernels:
    return TorchKernels(case.options(), CPU)


@settings(max_examples=num_examples(66, 1000), deadline=None)
@given(case=lora_cases(DTYPES, max_rows=40, max_inputs=300, max_outputs=70, max_rank=20))
def test_add_lora(case: LoraCase) -> None:
    check_company(kernels_for(case), case, range(len(case.lora_slots)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_threads_nor_pieces_show(dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of an operation decides whether torch uses several threads, and how it is cut into pieces."""
    case = LoraCase(dtype, dtype, 577, (900, 61), 9, ((9, 4), (0, 7)), (0, 1, -1, 1, 0) * 20, seed=1)
    check_company(kernels_for(case), case, range(0, 100, 7))
    kernels, whole, in_pieces = kernels_for(case), case.out(), case.out()
    inputs = (case.weights(kernels), torch.tensor(case.lora_slots))
    kernels.add_lora(case.x(), whole, *inputs)
    monkeypatch.setattr(lora, "MAX_PRODUCTS", 3 * 9 * 900)
    kernels.add_lora(case.x(), in_pieces, *inputs)
    assert torch.equal(bits(in_pieces), bits(whole))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest result of an operation inside the context."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view() and not func.__name__.split(".")[0].endswith("_"):
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


def test_many_rows_take_no_more_memory() -> None:
    case = LoraCase(torch.float32, torch.float32, 500, (10000,), 4, ((4,),), (0,) * 400, seed=0)
    kernels, x, out = kernels_for(case), case.x(), case.out()
    weights, lora_slots = case.weights(kernels), torch.tensor(case.lora_slots)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        kernels.add_lora(x, out, weights, lora_slots)
    assert 0 < largest.num_bytes <= 4 * lora.MAX_PRODUCTS < out.nbytes
    case.check(out, weights)


def test_slots() -> None:
    assert TorchKernels(KernelOptions(torch.bfloat16), CPU).new_lora_weights((5, 3), 7) is None
    options = KernelOptions(torch.bfloat16, num_lora_slots=3, max_lora_rank=2)
    weights = TorchKernels(options, CPU).new_lora_weights([5, 3], 7)
    assert weights is not None
    assert (weights.a.shape, weights.b.shape, weights.ranks.shape) == ((3, 2, 2, 7), (3, 2, 8), (3, 2))
    assert (weights.a.dtype, weights.b.dtype, weights.ranks.dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)
    assert weights.sizes == (5, 3)
    assert not any(tensor.any() for tensor in (weights.a, weights.b, weights.ranks))
