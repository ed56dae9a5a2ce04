"""Kernels whose offsets overflow 32 bits in known ways, and the same ones mended: do the checks tell them apart?

`python -m tests.support.overflowing_kernels` prints the findings of `triton_offsets.py` for each.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl

from tests.support.gpu_trace import META, traced
from tests.support.triton_offsets import findings

NUM_ROWS, STRIDE = 2**16, 2**16  # their product needs 33 bits


@triton.jit
def _row(x, stride, table, IS_WIDE: tl.constexpr):
    row = tl.program_id(0)
    if IS_WIDE:
        row = row.to(tl.int64)
    tl.store(x + row * stride + tl.arange(0, 16), 0.0)


@triton.jit
def _row_of_table(x, stride, table, IS_WIDE: tl.constexpr):
    row = tl.load(table + tl.program_id(0))
    if IS_WIDE:
        row = row.to(tl.int64)
    tl.store(x + row * stride, 0.0)


@triton.jit
def _column_first(x, stride, table, IS_WIDE: tl.constexpr):
    """Multiply a vector, select and broadcast before the address is computed."""
    rows = tl.program_id(0) + tl.arange(0, 16)
    if IS_WIDE:
        rows = rows.to(tl.int64)
    offsets = tl.where(rows > 3, rows, 0)[:, None] * stride + tl.arange(0, 16)[None, :]
    tl.store(x + offsets, 0.0)


@triton.jit
def _sum(x, stride, table, IS_WIDE: tl.constexpr):
    """Add up a loop's offset."""
    offset = tl.program_id(0)
    if IS_WIDE:
        offset = offset.to(tl.int64)
    for _ in range(0, stride):
        tl.store(x + offset, 0.0)
        offset += stride


@triton.jit
def _mask(x, stride, table, IS_WIDE: tl.constexpr):
    """Compare an offset that overflows; the address itself does not."""
    row = tl.program_id(0)
    if IS_WIDE:
        row = row.to(tl.int64)
    tl.store(x + tl.arange(0, 16), 0.0, mask=row * stride + tl.arange(0, 16) < stride)


@triton.jit
def _loop_variable(x, stride, table, IS_WIDE: tl.constexpr):
    """Step over the end of 32 bits."""
    step = 1 if IS_WIDE else 2**17
    for start in range(0, stride * 32767, step):
        tl.store(x + start, 0.0)


@triton.jit
def _while(x, stride, table, IS_WIDE: tl.constexpr):
    row = tl.program_id(0)
    if IS_WIDE:
        row = row.to(tl.int64)
    while row < stride:
        tl.store(x + row * stride, 0.0)
        row += 1


KERNELS: list[Any] = [_row, _row_of_table, _column_first, _sum, _mask, _loop_variable, _while]


def main() -> None:
    x, table = torch.empty(2**33, dtype=torch.float32, device=META), torch.empty(99, dtype=torch.int32, device=META)
    found = {}
    for kernel in KERNELS:
        for is_wide in (False, True):
            with traced() as trace:
                kernel[(NUM_ROWS,)](x, STRIDE, table, IS_WIDE=is_wide)
            ((name, texts),) = findings(trace.launches).items()
            found[f"{name}, {'wide' if is_wide else 'narrow'}"] = texts
    print(json.dumps(found))


if __name__ == "__main__":
    main()
