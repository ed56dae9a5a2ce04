"""Matrix products by the library that torch uses, in a form whose results do not depend on the number of rows.

A library may add up a row in another order when there are few rows. `find_invariant` tries a product on many numbers of
rows and picks the cheapest workaround: padding the rows to a multiple, or taking them in pieces of a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.interface import LinearOp

Product: TypeAlias = Callable[[Tensor], Tensor]
Invariant: TypeAlias = Callable[[Product], Product]  # wraps a product

ROW_MULTIPLES = (1, 2, 4, 8, 16, 64)  # candidates for padding
ROW_PIECE = 64  # rows of a piece, if no padding helps
PROBE_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 18, 24, 31, 33, 48, 64, 96, 192, 256, 384)
PROBE_RESULTS = 2**18  # results to compare for each number of rows
PROBE_SENSITIVE = (8, 512)  # least and most rows in which any other order of additions shows, to draw for that
PROBE_MAX_RESULTS = 2**25  # results of the largest product to try


def new_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a function that computes x W^T + b, for a weight W [M, K]."""
    return _packed_product(weight, bias) if _can_pack(weight) else _plain_product(weight, bias)


def adding(product: Product) -> LinearOp:
    """Return the product as an operation that can add to a residual stream."""

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return product(x) if residual is None else residual.add_(product(x))

    return linear


def find_invariant(product: Product, weight: Tensor, bias: Tensor | None, max_num_rows: int) -> Invariant | None:
    """Return the cheapest wrapper that makes x W^T + b independent of the number of rows; None if none does."""
    num_outputs, num_inputs = weight.shape
    least, most = PROBE_SENSITIVE
    num_rows = max(least, min(most, PROBE_RESULTS // num_outputs))
    most_rows = max(num_rows, ROW_PIECE, min(max_num_rows, PROBE_MAX_RESULTS // num_outputs))
    x = random_numbers(most_rows, num_inputs, device=weight.device, dtype=weight.dtype)
    _make_sensitive(x[:num_rows], weight, bias)
    probes = [rows for rows in PROBE_ROWS if rows <= most_rows]
    invariants: list[Invariant] = [*(partial(padded, multiple=multiple) for multiple in ROW_MULTIPLES), _in_pieces]
    for invariant in invariants:
        candidate = invariant(product)
        expected = candidate(x)
        if all(
            torch.equal(candidate(x[first : first + rows]), expected[first : first + rows])
            for rows in probes
            for first in range(0, max(1, num_rows - rows + 1), rows)
        ):
            return invariant
    return None


def _make_sensitive(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Change two numbers of each row of x, so that one of its results is almost 0.

    What is left over of the sum is as small as the errors of rounding, in which any other order of additions shows.
    Otherwise one of some 70,000 results shows it, because most are rounded to the same number.
    """
    outputs = torch.arange(len(x), device=x.device) % len(weight)
    rows, constant = weight[outputs].double(), 0.0 if bias is None else bias[outputs].double()
    places = rows.abs().topk(min(2, rows.shape[1])).indices
    x.scatter_(1, places, 0.0)
    for place in torch.split(places, 1, dim=1):
        total = (x.double() * rows).sum(dim=1) + constant
        x.scatter_(1, place, (-total[:, None] / rows.gather(1, place)).nan_to_num(0.0, 0.0, 0.0).to(x.dtype))


def padded(product: Product, multiple: int) -> Product:
    """Return the same product, computed over a multiple of `multiple` rows."""

    def compute(x: Tensor) -> Tensor:
        missing = -len(x) % multiple
        return product(F.pad(x, (0, 0, 0, missing)))[: len(x)] if missing else product(x)

    return compute


def random_numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return normally distributed numbers, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _in_pieces(product: Product) -> Product:
    """Return the same product, computed over ROW_PIECE rows at a time."""
    padded_product = padded(product, ROW_PIECE)

    def compute(x: Tensor) -> Tensor:
        return torch.cat([padded_product(piece) for piece in torch.split(x, ROW_PIECE)])

    return compute


def _can_pack(weight: Tensor) -> bool:
    """Return whether oneDNN computes products with a weight: in bfloat16, on a CPU that multiplies it."""
    is_bfloat16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a oneDNN product with the weight in oneDNN's own layout, so that no call reorders it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


def _plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)
