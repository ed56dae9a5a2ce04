"""Small programs of the C++ kernels, which run on rows of a test's tables."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.library import Program
from engine.kernels.interface import KernelOptions
from tests.support.kernel_choice import load_library

MAX_ROWS = 130


def make_kernels(code_path: str, num_threads: int = 1, options: KernelOptions | None = None) -> CpuKernels:
    """Return kernels in float32, unless `options` say otherwise."""
    return CpuKernels(load_library(code_path), options or KernelOptions(torch.float32), num_threads)


class Rows:
    """A recorded operation: call it with row numbers and it computes those rows of `tables`."""

    def __init__(
        self, kernels: CpuKernels, tables: Sequence[Tensor], operation: Callable[..., Tensor], max_rows: int = MAX_ROWS
    ) -> None:
        self.program = Program(kernels.library, kernels.team)
        self.rows = torch.zeros(max_rows, dtype=torch.int64)
        self.num_rows = np.zeros(2, dtype=np.int64)
        with kernels.recording(self.program, {self.rows.data_ptr(): self.num_rows.ctypes.data}):
            self.out = operation(self.rows, *(kernels.gather(table, self.rows) for table in tables))

    def __call__(self, rows: Sequence[int], num_prompt_rows: int = 0) -> Tensor:
        """Run on rows, of which the last `num_prompt_rows` are those of prompts and the others of generated tokens."""
        self.rows[: len(rows)] = torch.tensor(rows)
        self.num_rows[:] = len(rows), len(rows) - num_prompt_rows
        self.out.fill_(7.0)  # must stay after the last row
        self.program.run()
        assert (self.out[len(rows) :] == 7.0).all()
        return self.out[: len(rows)].clone()


def assert_rows_are_independent(rows: Rows, num_rows: int = MAX_ROWS) -> Tensor:
    """Check that a row has the same bits alone, at any index and among any rows. Returns the result of all rows."""
    everything = assert_rows_of_a_kind_are_independent(rows, num_rows, are_prompts=False)
    prompts = assert_rows_of_a_kind_are_independent(rows, num_rows, are_prompts=True)
    for num_prompt_rows in (1, 40, num_rows - 1):
        mixed = rows(range(num_rows), num_prompt_rows)
        first = num_rows - num_prompt_rows
        assert torch.equal(mixed, torch.cat([everything[:first], prompts[first:]])), f"{num_prompt_rows} of prompts"
    return everything


def assert_rows_of_a_kind_are_independent(rows: Rows, num_rows: int, *, are_prompts: bool) -> Tensor:
    everything = rows(range(num_rows), are_prompts * num_rows)
    alone = torch.cat([rows([row], are_prompts) for row in range(num_rows)])
    assert torch.equal(alone, everything)
    for num in range(2, 41):
        some = list(range(num_rows - num, num_rows))[:: 1 if num % 2 else -1]
        assert torch.equal(rows(some, are_prompts * num), everything[some]), f"{num} rows"
    return everything


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Check that each number is within its bound."""
    worst = ((actual.double() - expected).abs() / bound).nan_to_num(nan=torch.inf).max()
    assert worst <= 1, f"an error is {worst} times its bound"
