"""Random products with LoRA adapters, and the same in NumPy's float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import KernelOptions, Kernels, LoraWeights
from tests.support.tensors import random_tensor


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

    def options(self) -> KernelOptions:
        return KernelOptions(self.dtype, num_lora_slots=len(self.ranks), max_lora_rank=self.max_rank)

    def x(self) -> Tensor:
        return random_tensor(self.seed, len(self.lora_slots), self.num_inputs, dtype=self.dtype)

    def out(self) -> Tensor:
        """Outputs with negative zeros, which adding a zero would change."""
        out = random_tensor(self.seed + 1, len(self.lora_slots), sum(self.sizes), dtype=self.out_dtype)
        out[:, ::3] = -0.0
        return out

    def weights(self, kernels: Kernels) -> LoraWeights:
        """Random weights, with NaN beyond each rank, which would show in a result."""
        weights = kernels.new_lora_weights(self.sizes, self.num_inputs)
        assert weights is not None
        weights.a[:] = random_tensor(self.seed + 2, *weights.a.shape) / self.num_inputs**0.5
        weights.b[:] = random_tensor(self.seed + 3, *weights.b.shape)
        weights.ranks[:] = torch.tensor(self.ranks)
        for slot, ranks in enumerate(self.ranks):
            columns = torch.split(weights.b[slot], list(self.sizes), dim=1)
            for rank, a, b in zip(ranks, weights.a[slot], columns, strict=True):
                a[rank:] = b[rank:] = torch.nan
        return weights

    def check(self, out: Tensor, weights: LoraWeights) -> None:
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

    def _added(self, weights: LoraWeights) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return what the adapters add, and the sum of the absolute values of its terms."""
        x, a, b = (tensor.double().cpu().numpy() for tensor in (self.x(), weights.a, weights.b))
        added, size = np.zeros((2, len(x), sum(self.sizes)))
        ends = np.cumsum(self.sizes)
        for row, slot in enumerate(self.lora_slots):
            if slot < 0:
                continue
            for part, rank in enumerate(self.ranks[slot]):
                columns = slice(ends[part] - self.sizes[part], ends[part])
                some_a, some_b = a[slot, part, :rank], b[slot, :rank, columns]
                added[row, columns] = (some_a @ x[row]) @ some_b
                size[row, columns] = (np.abs(some_a) @ np.abs(x[row])) @ np.abs(some_b)
        return added, size


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).view(*tensor.shape, tensor.element_size())


@st.composite
def lora_cases(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype], max_rows: int, max_inputs: int, max_outputs: int, max_rank: int
) -> LoraCase:
    dtype = draw(st.sampled_from(dtypes))
    sizes = draw(st.lists(st.integers(1, max_outputs), min_size=1, max_size=3).map(tuple))
    rank, num_slots, num_rows = (draw(st.integers(1, most)) for most in (max_rank, 3, max_rows))
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


def check_company(kernels: Kernels, case: LoraCase, rows: Sequence[int]) -> None:
    """Check that rows have the same bits alone, and among other rows with other adapters."""
    weights = case.weights(kernels)
    inputs = (case.x(), case.out(), torch.tensor(case.lora_slots))
    x, before, lora_slots = (tensor.to(weights.a.device) for tensor in inputs)
    whole = before.clone()
    kernels.add_lora(x, whole, weights, lora_slots)
    case.check(whole, weights)
    for row in rows:
        alone = before[row : row + 1].clone()
        kernels.add_lora(x[row : row + 1], alone, weights, lora_slots[row : row + 1])
        assert torch.equal(bits(alone[0]), bits(whole[row]))
    last = rows[-1]
    others = x.flip(0) * 3
    others[last] = x[last]
    other_slots = (lora_slots + 1) % len(case.ranks)
    other_slots[last] = lora_slots[last]
    among_others = before.clone()
    kernels.add_lora(others, among_others, weights, other_slots)
    assert torch.equal(bits(among_others[last]), bits(whole[last]))
