"""LoRA adapters in all kernels: against NumPy's float64, and batch invariance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.interface import KernelOptions, Kernels
from engine.kernels.torch.kernels import TorchKernels
from engine.parts.lora import layers
from engine.parts.lora.layers import LoraLayer, new_lora_layer
from engine.parts.triton import lora
from tests.support.examples import num_examples
from tests.support.kernel_choice import code_paths
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, PRODUCT_DTYPES, random_tensor
from tests.support.kernel_kinds import Kind, record
from tests.support.tensors import CPU

NAMES = ["torch", *code_paths()]
TILE = (lora.COLUMNS, lora.INPUTS, lora.RANKS, lora.ROWS, lora.SPLIT_INPUTS)
COLUMNS, INPUTS, RANKS, ROWS, SPLIT_INPUTS = (size.value for size in TILE)
TRITON = pytest.param("triton", marks=ALSO_ON_A_GPU)
TRITON_LATER = pytest.param("triton", marks=[*ALSO_ON_A_GPU, pytest.mark.long])


@dataclass(frozen=True)
class LoraCase:
    dtype: torch.dtype
    out_dtype: torch.dtype
    num_inputs: int
    sizes: tuple[int, ...]  # outputs of each projection
    max_rank: int
    ranks: tuple[tuple[int, ...], ...]  # of the projections of each slot
    lora_slots: tuple[int, ...]  # of each row
    seed: int
    x_dtype: torch.dtype | None = None  # the C++ kernels' rows are always float32

    def x(self) -> Tensor:
        return random_tensor(self.seed, len(self.lora_slots), self.num_inputs, dtype=self.x_dtype or self.dtype)

    def out(self) -> Tensor:
        """Outputs with negative zeros, which adding a zero would change."""
        out = random_tensor(self.seed + 1, len(self.lora_slots), sum(self.sizes), dtype=self.out_dtype)
        out[:, ::3] = -0.0
        return out

    def layer(self, kernels: Kernels) -> LoraLayer:
        """Random weights, with NaN beyond each rank, which would show in a result."""
        weights = new_lora_layer(kernels, self.sizes, self.num_inputs, len(self.ranks), self.max_rank)
        weights.a[:] = random_tensor(self.seed + 2, *weights.a.shape) / self.num_inputs**0.5
        weights.b[:] = random_tensor(self.seed + 3, *weights.b.shape)
        weights.ranks[:] = torch.tensor(self.ranks)
        for slot, ranks in enumerate(self.ranks):
            columns = torch.split(weights.b[slot], list(self.sizes), dim=1)
            for rank, a, b in zip(ranks, weights.a[slot], columns, strict=True):
                a[rank:] = b[rank:] = torch.nan
        return weights

    def check(self, out: Tensor, weights: LoraLayer) -> None:
        """Assert that each number is within its rounding errors, and unchanged where the adapters add nothing.

        The factor 1.01 is for Triton's interpreter, which truncates to bfloat16 instead of rounding.
        """
        out, before = out.cpu(), self.out()
        added, size = self._added(weights)
        expected = before.double().numpy() + added
        roundings = torch.finfo(self.out_dtype).eps * (np.abs(added) + np.abs(expected))
        assert (np.abs(out.double().numpy() - expected) <= 1.01 * roundings + 2e-6 * size).all()
        untouched = torch.from_numpy(size == 0)
        assert torch.equal(bits(out)[untouched], bits(before)[untouched])

    def _added(self, weights: LoraLayer) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return what the adapters add, and the sum of the absolute values of its terms."""
        x, a, b = (tensor.double().cpu().numpy() for tensor in (self.x(), weights.a, weights.b))
        added, size = np.zeros((2, len(x), sum(self.sizes)))
        columns = np.split(np.arange(sum(self.sizes)), np.cumsum(self.sizes)[:-1])
        for row, slot in enumerate(self.lora_slots):
            for part, rank in enumerate(self.ranks[slot] if slot >= 0 else ()):
                some_a, some_b = a[slot, part, :rank], b[slot, :rank, columns[part]].T
                added[row, columns[part]] = (some_a @ x[row]) @ some_b
                size[row, columns[part]] = (np.abs(some_a) @ np.abs(x[row])) @ np.abs(some_b)
        return added, size


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).view(*tensor.shape, tensor.element_size())


def check_company(name: str, case: LoraCase, rows: Sequence[int], num_threads: int = 2) -> None:
    """Check that rows have the same bits alone, and among other rows with other adapters."""
    kind = Kind(name, case.dtype, num_threads)
    if kind.is_cpp:
        case = replace(case, x_dtype=torch.float32, out_dtype=torch.float32)
    kernels = kind.new()
    layer = case.layer(kernels)
    inputs = (case.x(), case.out(), torch.tensor(case.lora_slots))
    x, before, lora_slots = (tensor.to(kind.device) for tensor in inputs)
    slots_of_step = torch.full_like(lora_slots, len(case.ranks) + 7)  # must not be read after the last row

    def operation(index: Tensor, x: Tensor, out: Tensor) -> Tensor:
        layer(x, out, slots_of_step if kind.is_cpp else slots_of_step[: len(out)])
        return out

    def add(x: Tensor, lora_slots: Tensor, rows: Sequence[int]) -> Tensor:
        slots_of_step[: len(rows)] = lora_slots[list(rows)]
        return record(kernels, [x, before], operation, max_rows=len(before))(rows)

    everything = range(len(before))
    whole = add(x, lora_slots, everything)
    case.check(whole, layer)
    for row in rows:
        assert torch.equal(bits(add(x, lora_slots, [row])), bits(whole[row : row + 1]))
    for num in (2, 3, 4, 5, 7, 12, 33):
        some = torch.randperm(len(before), generator=torch.Generator().manual_seed(num))[:num].tolist()
        assert torch.equal(bits(add(x, lora_slots, some)), bits(whole[some])), f"{num} rows"
    last = rows[-1]
    others = x.flip(0) * 3
    others[last] = x[last]
    other_slots = (lora_slots + 1) % len(case.ranks)
    other_slots[last] = lora_slots[last]
    assert torch.equal(bits(add(others, other_slots, everything)[last]), bits(whole[last]))


@st.composite
def lora_cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype], max_inputs: int, max_outputs: int) -> LoraCase:
    dtype = draw(st.sampled_from(dtypes))
    sizes = draw(st.lists(st.integers(1, max_outputs), min_size=1, max_size=3).map(tuple))
    rank, num_slots, num_rows = (draw(st.integers(1, most)) for most in (12, 3, 40))
    parts = st.tuples(*[st.integers(0, rank)] * len(sizes))
    return LoraCase(
        dtype,
        draw(st.sampled_from([dtype, torch.float32])),
        draw(st.integers(1, max_inputs)),
        sizes,
        rank,
        draw(st.tuples(*[parts] * num_slots)),
        draw(st.tuples(*[st.integers(-1, num_slots - 1)] * num_rows)),
        draw(st.integers(0, 2**32)),
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=num_examples(25, 200), deadline=None)
@given(case=lora_cases([torch.float32, torch.bfloat16], max_inputs=300, max_outputs=70))
def test_add_lora(name: str, case: LoraCase) -> None:
    check_company(name, case, range(0, len(case.lora_slots), 2))


@pytest.mark.parametrize("name", [TRITON_LATER])
@settings(max_examples=40, deadline=None)
@given(case=lora_cases(PRODUCT_DTYPES, max_inputs=90, max_outputs=40))
def test_add_lora_in_triton(name: str, case: LoraCase) -> None:
    check_company(name, case, range(0, len(case.lora_slots), 4))


@pytest.mark.parametrize("name", [*NAMES, TRITON])
def test_beyond_one_tile(name: str) -> None:
    """There are several steps and splits of the inputs, pieces of the ranks, and tiles of a projection's columns."""
    sizes, max_rank = (COLUMNS + 88, 2 * COLUMNS, 1), 2 * RANKS + 8
    ranks = ((max_rank, RANKS, 1), (RANKS + 1, 0, 33))
    for dtype in (torch.float16,) if name == "triton" else (torch.float32, torch.bfloat16):
        case = LoraCase(dtype, dtype, SPLIT_INPUTS + INPUTS + 3, sizes, max_rank, ranks, (0, -1, 1, 0), seed=2)
        check_company(name, case, range(4))
        if name in code_paths():
            check_company(name, case, range(4), num_threads=1)


@pytest.mark.parametrize("name", [*NAMES, TRITON_LATER])
@pytest.mark.parametrize("num_slots", [1, 3, ROWS + 1])
def test_tiles_of_rows(num_slots: int, name: str) -> None:
    """Adapters begin and end within tiles, and a tile may have as many as rows. The last tile is not full."""
    num_rows = 2 * ROWS + 3
    lora_slots = tuple(sorted(row % (num_slots + 1) - 1 for row in range(num_rows)))
    ranks = tuple((1 + slot % 3,) for slot in range(num_slots))
    case = LoraCase(torch.float32, torch.float32, 40, (30,), 3, ranks, lora_slots, seed=3)
    check_company(name, case, [0, 1, ROWS - 1, ROWS, num_rows - 2, num_rows - 1])


# Plain torch.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pieces_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of an operation decides how it is cut into pieces."""
    case = LoraCase(dtype, dtype, 577, (900, 61), 9, ((9, 4), (0, 7)), (0, 1, -1, 1, 0) * 20, seed=1)
    check_company("torch", case, range(0, 100, 7))
    whole, in_pieces = case.out(), case.out()
    layer, lora_slots = case.layer(TorchKernels(KernelOptions(dtype), CPU)), torch.tensor(case.lora_slots)
    layer(case.x(), whole, lora_slots)
    monkeypatch.setattr(layers, "MAX_PRODUCTS", 3 * 9 * 900)
    layer(case.x(), in_pieces, lora_slots)
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
    layer, x, out = case.layer(TorchKernels(KernelOptions(case.dtype), CPU)), case.x(), case.out()
    with Largest() as largest:  # type: ignore[no-untyped-call]
        layer(x, out, torch.tensor(case.lora_slots))
    assert 0 < largest.num_bytes <= 4 * layers.MAX_PRODUCTS < out.nbytes
    case.check(out, layer)


# Triton.


@pytest.mark.parametrize("kernels", [pytest.param("triton", marks=ALSO_ON_A_GPU)])
def test_nothing_is_launched_if_no_row_has_an_adapter(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LoraCase(torch.float32, torch.float32, 4, (3,), 1, ((1,),), (-1, -1), seed=0)
    layer, x, out = case.layer(Kind(kernels).new()), case.x().to(DEVICE), case.out().to(DEVICE)
    monkeypatch.setattr(lora, "_shrink", None)
    layer(x, out, torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert torch.equal(bits(out.cpu()), bits(case.out()))
    with pytest.raises(TypeError):
        layer(x, out, torch.tensor(case.lora_slots, device=DEVICE))


@pytest.mark.parametrize("kernels", [TRITON_LATER])
def test_rows_that_do_not_lie_side_by_side(kernels: str) -> None:
    case = LoraCase(torch.float16, torch.float16, 40, (30, 5), 3, ((3, 1),), (0, -1, 0, 0, 0), seed=4)
    layer, lora_slots = case.layer(Kind(kernels, torch.float16).new()), torch.tensor(case.lora_slots, device=DEVICE)
    x, out = torch.zeros(5, 60).half().to(DEVICE), torch.zeros(5, 50).half().to(DEVICE)
    x[:, 7:47], out[:, 6:41] = case.x(), case.out()
    layer(x[:, 7:47], out[:, 6:41], lora_slots)
    case.check(out[:, 6:41], layer)
    assert not out[:, :6].any()
    assert not out[:, 41:].any()
