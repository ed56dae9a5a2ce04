"""Adapters on plain torch: against NumPy's float64, and promise 1."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.torch import kernels as reference
from engine.kernels.torch.kernels import TorchKernels
from tests.engine.kernels.torch.test_kernels import CPU, num_threads
from tests.support.lora_products import LoraCase, bits, check_company, lora_cases

__all__ = ["num_threads"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels_for(case: LoraCase) -> TorchKernels:
    return TorchKernels(CPU, case.dtype, num_lora_places=len(case.ranks), max_lora_rank=case.max_rank)


@settings(max_examples=200, deadline=None)
@given(case=lora_cases(DTYPES, max_rows=40, max_inputs=300, max_outputs=70, max_rank=20))
def test_add_lora(case: LoraCase) -> None:
    check_company(kernels_for(case), case, range(len(case.places)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_threads_nor_pieces_show(dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether torch gives an operation to several threads depends on its size, and so do pieces."""
    case = LoraCase(dtype, dtype, 577, (900, 61), 9, ((9, 4), (0, 7)), (0, 1, -1, 1, 0) * 20, seed=1)
    check_company(kernels_for(case), case, range(0, 100, 7))
    kernels, whole, in_pieces = kernels_for(case), case.out(), case.out()
    inputs = (case.weights(kernels), torch.tensor(case.places))
    kernels.add_lora(case.x(), whole, *inputs)
    monkeypatch.setattr(reference, "LORA_NUMBERS", 3 * 9 * 900)
    kernels.add_lora(case.x(), in_pieces, *inputs)
    assert torch.equal(bits(in_pieces), bits(whole))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of a result inside."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view() and not func.__name__.split(".")[0].endswith("_"):
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


def test_many_rows_take_no_more_memory() -> None:
    case = LoraCase(torch.float32, torch.float32, 500, (10000,), 4, ((4,),), (0,) * 400, seed=0)
    kernels, x, out = kernels_for(case), case.x(), case.out()
    weights, places = case.weights(kernels), torch.tensor(case.places)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        kernels.add_lora(x, out, weights, places)
    assert 0 < largest.num_bytes <= 4 * reference.LORA_NUMBERS < out.nbytes
    case.check(out, weights)


def test_places() -> None:
    assert TorchKernels(CPU, torch.bfloat16).new_lora_weights((5, 3), 7) is None
    weights = TorchKernels(CPU, torch.bfloat16, num_lora_places=3, max_lora_rank=2).new_lora_weights([5, 3], 7)
    assert weights is not None
    assert (weights.a.shape, weights.b.shape, weights.ranks.shape) == ((3, 2, 2, 7), (3, 2, 8), (3, 2))
    assert (weights.a.dtype, weights.b.dtype, weights.ranks.dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)
    assert weights.sizes == (5, 3)
    assert not any(tensor.any() for tensor in (weights.a, weights.b, weights.ranks))
