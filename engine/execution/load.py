"""The ways in which a model runs on its kernels: operation by operation, as a recorded program, or in CUDA graphs."""

from __future__ import annotations

import sys
from typing import Protocol

from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.kernels.interface import Kernels
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache
from engine.shared.parts import engine_part


class Execution(Protocol):
    """A model that is ready to run step after step in the same buffers."""

    max_logit_rows: int  # whose logits one run of the model's head computes
    uncaptured: list[int]  # batch sizes whose CUDA graphs are still to be captured, the next one last

    def capture_next(self) -> None:
        """Capture the graphs of the last size of `uncaptured`, if any, which is then removed from the list.

        No step may be in flight.
        """
        ...

    def forward(self, batch: BatchInputs) -> None:
        """Compute the last hidden states of the batch's `hidden_rows`, and store the keys and values of every row."""
        ...

    def compute_hidden(self, rows: Tensor) -> Tensor:
        """Return the normalized last hidden states [R, hidden_size] of the rows [R] int64 of `hidden_rows`.

        The result is valid until the next call.
        """
        ...

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Return the float32 logits [R, V] of the rows [R] int64 of `hidden_rows`, valid until the next call."""
        ...


class EagerExecution:
    """Runs the model's code for every batch."""

    def __init__(self, model: CausalLM, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.hidden: Tensor | None = None
        self.max_logit_rows = sys.maxsize
        self.uncaptured: list[int] = []

    def capture_next(self) -> None:
        """Do nothing: there are no graphs."""

    def forward(self, batch: BatchInputs) -> None:
        self.hidden = self.model.forward(batch, self.kv_cache)

    def compute_hidden(self, rows: Tensor) -> Tensor:
        assert self.hidden is not None
        return self.model.compute_hidden(self.hidden, rows)

    def compute_logits(self, rows: Tensor) -> Tensor:
        assert self.hidden is not None
        return self.model.compute_logits(self.hidden, rows)


def prepare_execution(kernels: Kernels, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> Execution:
    """Return the execution of a model for the batches of a builder, of the kind that its kernels need."""
    if kernels.execution == "program":
        from engine.execution.cpu_program import CpuExecution
        from engine.kernels.cpu.kernels import CpuKernels

        assert isinstance(kernels, CpuKernels)
        return CpuExecution(kernels, model, kv_cache, builder)
    if kernels.execution == "cuda_graphs":
        execution: Execution = engine_part("triton", "cuda_graphs").prepare(model, kv_cache, builder)
        return execution
    return EagerExecution(model, kv_cache)
