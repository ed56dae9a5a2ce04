"""LoRA (Hu et al. 2021) in plain torch: y += B (A x), with the adapter of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.interface import KernelOptions, LoraWeights
from engine.kernels.lazy_memory import lazy_zeros

MAX_PRODUCTS = 2**20  # numbers multiplied at once before they are added up


def new_lora_weights(
    options: KernelOptions, sizes: Sequence[int], num_inputs: int, device: torch.device
) -> LoraWeights | None:
    """Return empty adapter slots for a product of projections with `sizes` outputs; None if there are no slots."""
    if not options.num_lora_slots:
        return None
    num_slots, max_rank, dtype = options.num_lora_slots, options.max_lora_rank, options.dtype
    return LoraWeights(
        a=lazy_zeros((num_slots, len(sizes), max_rank, num_inputs), dtype, device),
        b=lazy_zeros((num_slots, max_rank, sum(sizes)), dtype, device),
        ranks=torch.zeros((num_slots, len(sizes)), dtype=torch.int64, device=device),
        sizes=tuple(sizes),
    )


def add_lora(x: Tensor, out: Tensor, weights: LoraWeights, lora_slots: Tensor) -> None:
    """Add the adapter of each row to out [T, M], in place, for x [T, K] and `lora_slots` int64 [T], -1: none."""
    sizes = list(weights.sizes)
    for slot in set(lora_slots.tolist()) - {-1}:
        rows = (lora_slots == slot).nonzero()[:, 0]
        columns, b = torch.split(out, sizes, dim=1), torch.split(weights.b[slot], sizes, dim=1)
        projections = zip(columns, weights.ranks[slot].tolist(), weights.a[slot], b, strict=True)
        for some_columns, rank, some_a, some_b in projections:
            if rank:
                _add_low_rank(x, some_columns, some_a[:rank].float(), some_b[:rank].float(), rows)


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
