"""All kinds of kernels, so that a test of an operation can run on each: plain torch, C++ code paths, and Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import KernelOptions, Kernels
from engine.kernels.torch.kernels import TorchKernels
from engine.parts.triton.kernels import TritonKernels
from tests.support.examples import IS_LONG
from tests.support.kernel_choice import code_paths
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, IS_INTERPRETED, TOLERANCES
from tests.support.recorded_kernels import MAX_ROWS, Rows, assert_rows_are_independent, make_kernels
from tests.support.tensors import CPU


class Kind(NamedTuple):
    name: str  # torch, triton, or a code path
    dtype: torch.dtype = torch.float32
    num_threads: int = 2
    kv_cache_dtype: str = "auto"

    @property
    def is_cpp(self) -> bool:
        return self.name not in ("torch", "triton")

    @property
    def is_slow(self) -> bool:
        return self.name == "triton" and IS_INTERPRETED

    @property
    def is_short(self) -> bool:
        """Whether one case must do: in Triton's interpreter, outside of `make test-long`."""
        return self.is_slow and not IS_LONG

    @property
    def device(self) -> torch.device:
        return DEVICE if self.name == "triton" else CPU

    @property
    def num_rows(self) -> int:
        return 9 if self.is_slow else MAX_ROWS

    def new(self, **options: Any) -> Kernels:
        of_kind: dict[str, Any] = {"dtype": self.dtype, "kv_cache_dtype": self.kv_cache_dtype}
        all_options = KernelOptions(**of_kind | options)
        if self.is_cpp:
            return make_kernels(self.name, self.num_threads, all_options)
        if self.name == "torch":
            return TorchKernels(all_options, self.device)
        return TritonKernels(all_options, self.device)

    def bound(self, expected: Tensor, more: Tensor | float = 0.0) -> Tensor:
        """Return the allowed errors: `more` is what the C++ kernels, which are held to little, may err in addition."""
        if self.is_cpp:
            return 2e-6 * expected.abs() + more + 1e-30
        return TOLERANCES[self.dtype] * (1 + expected.abs())


def _all_kinds() -> list[ParameterSet]:
    """One thread and most of what the interpreter runs is left to `make test-long`."""
    kinds: list[tuple[Kind, list[pytest.MarkDecorator]]] = [
        (Kind("torch", dtype), []) for dtype in (torch.float32, torch.bfloat16)
    ]
    kinds += [(Kind(path), []) for path in code_paths()]
    kinds += [(Kind(path, num_threads=1), [pytest.mark.long]) for path in code_paths()]
    for dtype in TOLERANCES:  # the interpreter multiplies in bfloat16 wrongly, but only there
        is_later = IS_INTERPRETED and dtype != torch.float16
        kinds.append((Kind("triton", dtype), [*ALSO_ON_A_GPU, *([pytest.mark.long] if is_later else [])]))
    names = [f"{kind.name}-{str(kind.dtype)[6:]}-{kind.num_threads}" for kind, _ in kinds]
    return [pytest.param(kind, marks=marks, id=name) for name, (kind, marks) in zip(names, kinds, strict=True)]


def kind_of(parameters: ParameterSet) -> Kind:
    kind = parameters.values[0]
    assert isinstance(kind, Kind)
    return kind


KINDS = _all_kinds()
CACHES = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float32, "int8")]
# The C++ kernels with each type of the KV cache.
CPP_CACHES = [Kind(path, dtype, kv_cache_dtype=stored) for dtype, stored in CACHES for path in code_paths()]
each_kind = pytest.mark.parametrize("kind", KINDS)


class Direct:
    """An operation of kernels that are not recorded, called like `Rows`."""

    def __init__(self, tables: Sequence[Tensor], operation: Callable[..., Tensor]) -> None:
        self.tables, self.operation = tables, operation

    def __call__(self, rows: Sequence[int], num_prompt_rows: int = 0) -> Tensor:
        index = torch.tensor(list(rows), dtype=torch.int64)
        tables = (table[index.to(table.device)] for table in self.tables)
        return self.operation(index.to(DEVICE), *tables).clone()


def record(
    kernels: Kernels, tables: Sequence[Tensor], operation: Callable[..., Tensor], max_rows: int = MAX_ROWS
) -> Rows | Direct:
    """Return an operation on rows of tables, which is called with row numbers. It may change its copies of the rows."""
    if isinstance(kernels, CpuKernels):
        return Rows(kernels, tables, operation, max_rows)
    return Direct(tables, operation)


def independent_rows(kind: Kind, rows: Rows | Direct) -> Tensor:
    """Check that a row has the same bits among any others, and with any number of threads. Returns all rows."""
    if isinstance(rows, Rows):
        return assert_rows_are_independent(rows)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    everything = rows(range(kind.num_rows))
    torch.set_num_threads(num_threads)
    assert torch.equal(torch.cat([rows([row]) for row in range(kind.num_rows)]), everything)
    for num in (2, 3, 5, 7, 33, 64, 111):
        if num < kind.num_rows:
            some = list(range(kind.num_rows - num, kind.num_rows))[:: 1 if num % 2 else -1]
            assert torch.equal(rows(some), everything[some]), f"{num} rows"
    return everything
