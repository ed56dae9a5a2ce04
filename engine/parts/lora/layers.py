"""What linear layers add for the LoRA adapters of a step's rows (Hu et al. 2021): y += B (A x)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.cpu.attention import LANES
from engine.kernels.cpu.c_structs import AddLoraParameters
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import Kernels
from engine.kernels.lazy_memory import lazy_zeros
from engine.model.linear import Linear
from engine.shared.parts import engine_part

MAX_PRODUCTS = 2**20  # numbers multiplied at once before they are added up


class LoraLayer:
    """The adapters of one linear layer, in P slots for one adapter each; this class adds in plain torch.

    The M outputs are those of several projections, concatenated (q, k and v, for example). Each has an A of its own.
    """

    input_multiple = 1  # of the numbers between rows of A
    num_more_outputs = 0  # between rows of B

    def __init__(self, kernels: Kernels, sizes: Sequence[int], num_inputs: int, num_slots: int, max_rank: int) -> None:
        self.kernels = kernels
        self.sizes = tuple(sizes)  # outputs of each projection
        dtype, device, num_outputs = kernels.dtype, kernels.device, sum(sizes)
        stride = -(-num_inputs // self.input_multiple) * self.input_multiple
        a = lazy_zeros((num_slots, len(sizes), max_rank, stride), dtype, device)
        b = lazy_zeros((num_slots, max_rank, num_outputs + self.num_more_outputs), dtype, device)
        self.a = a[..., :num_inputs]  # [P, projections, R, K]
        self.b = b[..., :num_outputs]  # [P, R, M], scaled
        # At most R; 0: nothing is added to the projection.
        self.ranks = torch.zeros((num_slots, len(sizes)), dtype=torch.int64, device=device)  # [P, projections]

    def __call__(self, x: Tensor, out: Tensor, lora_slots: Tensor) -> None:
        """Add the adapter of each row, B (A x), to out [T, M], in place, for x [T, K]. Sums are float32.

        `lora_slots`, int64 [T], holds the slot of each row's adapter, -1 for none. It is empty if no row has one.
        """
        sizes = list(self.sizes)
        for slot in set(lora_slots.tolist()) - {-1}:
            rows = (lora_slots == slot).nonzero()[:, 0]
            columns, b = torch.split(out, sizes, dim=1), torch.split(self.b[slot], sizes, dim=1)
            for some_columns, rank, some_a, some_b in zip(
                columns, self.ranks[slot].tolist(), self.a[slot], b, strict=True
            ):
                if rank:
                    _add_low_rank(x, some_columns, some_a[:rank].float(), some_b[:rank].float(), rows)

    def check_sizes(self, x: Tensor, out: Tensor) -> None:
        """Check that all tensors fit each other, for kernels that take a size from one and use it for another."""
        num_slots, num_projections, max_rank, num_inputs = self.a.shape
        assert num_projections == len(self.sizes)
        assert self.b.shape == (num_slots, max_rank, sum(self.sizes))
        assert self.ranks.shape == (num_slots, num_projections)
        assert x.shape[1] == num_inputs
        assert out.shape == (len(x), sum(self.sizes))


class TritonLoraLayer(LoraLayer):
    """Adds with the kernels of the part `triton`."""

    def __init__(self, kernels: Kernels, sizes: Sequence[int], num_inputs: int, num_slots: int, max_rank: int) -> None:
        super().__init__(kernels, sizes, num_inputs, num_slots, max_rank)
        self.triton = engine_part("triton", "lora")
        self.tiles = self.triton.column_tiles(self.sizes, kernels.device)

    def __call__(self, x: Tensor, out: Tensor, lora_slots: Tensor) -> None:
        self.check_sizes(x, out)
        self.triton.add_lora(x, out, self.a, self.b, self.ranks, lora_slots, self.sizes, self.tiles)


def new_lora_layer(kernels: Kernels, sizes: Sequence[int], num_inputs: int, num_slots: int, max_rank: int) -> LoraLayer:
    """Return empty slots for a product of projections with `sizes` outputs."""
    kind = LoraLayer
    if isinstance(kernels, CpuKernels):
        kind = CpuLoraLayer
    elif kernels.name.startswith("triton"):
        kind = TritonLoraLayer
    return kind(kernels, sizes, num_inputs, num_slots, max_rank)


@torch.inference_mode()
def add_slots(linears: Sequence[Linear], num_slots: int, max_rank: int) -> None:
    """Give linear layers empty slots."""
    for linear in linears:
        layer = new_lora_layer(linear.kernels, linear.sizes, linear.num_inputs, num_slots, max_rank)
        linear.additions.append(layer)


def _add_low_rank(x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> None:
    """Add B (A x) to the rows `rows` of out [T, M], for A [r, K] and B^T [r, M] in float32; rounded like a product.

    Written without a library's products, whose order of additions may depend on the number of rows: this costs time,
    but needs no probing.
    """
    rows_at_once = max(1, MAX_PRODUCTS // max(a.numel(), b.numel()))
    for some in torch.split(rows, rows_at_once):
        inner = _sum_by_halves(x[some, None].float() * a, dim=2)
        out[some] += _sum_by_halves(inner[:, :, None] * b, dim=1).to(out.dtype)


def _sum_by_halves(numbers: Tensor, dim: int) -> Tensor:
    """Return the sum over `dim`, adding the second half to the first until one is left. Overwrites `numbers`."""
    size = numbers.shape[dim]
    while size > 1:
        half = size // 2
        numbers.narrow(dim, 0, half).add_(numbers.narrow(dim, size - half, half))
        size -= half
    return numbers.select(dim, 0)


class CpuLoraLayer(LoraLayer):
    """Adds a call to the program that is recorded.

    Rows of A are padded to whole vectors, rows of B by one vector more, so that any vector can be read.
    """

    input_multiple = num_more_outputs = LANES

    def __call__(self, x: Tensor, out: Tensor, lora_slots: Tensor) -> None:
        kernels = self.kernels
        assert isinstance(kernels, CpuKernels)
        self.check_sizes(x, out)
        _, num_parts, max_rank, num_inputs = self.a.shape
        part_ends = torch.tensor(self.sizes).cumsum(0)
        shrunk = kernels.temporary(torch.Size((len(x), num_parts, max_rank)), torch.float32)
        parameters = AddLoraParameters(
            num_rows=kernels.buffer(x).num_rows,
            lora_slots=lora_slots.data_ptr(),
            input=kernels.read(x),
            input_stride=x.stride(0),
            num_inputs=num_inputs,
            a=self.a.data_ptr(),
            a_stride=self.a.stride(2),
            b=self.b.data_ptr(),
            b_stride=self.b.stride(1),
            ranks=self.ranks.data_ptr(),
            part_ends=part_ends.data_ptr(),
            num_parts=num_parts,
            max_rank=max_rank,
            shrunk=shrunk.data_ptr(),
            output=kernels.change(out),
            output_stride=out.stride(0),
        )
        kernels.call(f"add_lora_{str(kernels.dtype).removeprefix('torch.')}", parameters, self, part_ends, shrunk)
