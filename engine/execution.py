"""The ways in which a model runs on its kernels: operation by operation, as a recorded program, or in CUDA graphs."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.library import Program
from engine.kernels.interface import Kernels
from engine.model.decoder import CausalLM
from engine.model.layer_inputs import KVCache
from engine.shared.parts import engine_part

LOGIT_ROWS_PER_SEQ = 8  # a sampled token and its draft
MIN_LOGIT_ROWS = 64


class Execution(ABC):
    """A model that is ready to run step after step in the same buffers."""

    max_logit_rows = sys.maxsize  # whose logits one run of the model's head computes
    uncaptured: list[int] = []  # batch sizes whose CUDA graphs are still to be captured, the next one last

    def capture_next(self) -> None:  # noqa: B027  where there are no graphs, there is nothing to do
        """Capture the graphs of the last size of `uncaptured`, if any, which is then removed from the list.

        No step may be in flight.
        """

    @abstractmethod
    def forward(self, batch: BatchInputs) -> None:
        """Compute the last hidden states of the batch's `hidden_rows`, and store the keys and values of every row."""

    @abstractmethod
    def compute_hidden(self, rows: Tensor) -> Tensor:
        """Return the normalized last hidden states [R, hidden_size] of the rows [R] int64 of `hidden_rows`.

        The result is valid until the next call.
        """

    @abstractmethod
    def compute_logits(self, rows: Tensor) -> Tensor:
        """Return the float32 logits [R, V] of the rows [R] int64 of `hidden_rows`, valid until the next call."""


class EagerExecution(Execution):
    """Runs the model's code for every batch."""

    hidden: Tensor

    def __init__(self, model: CausalLM, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache

    def forward(self, batch: BatchInputs) -> None:
        self.hidden = self.model.forward(batch, self.kv_cache)

    def compute_hidden(self, rows: Tensor) -> Tensor:
        return self.model.compute_hidden(self.hidden, rows)

    def compute_logits(self, rows: Tensor) -> Tensor:
        return self.model.compute_logits(self.hidden, rows)


class CpuExecution(Execution):
    """Runs recorded programs: one computes the hidden states of a batch, two more the logits or norms of rows.

    They read the batch from the builder's buffers.
    """

    def __init__(self, kernels: CpuKernels, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> None:
        batch = builder.buffers()
        num_rows, num_seqs = builder.num_rows.ctypes.data, builder.num_seqs.ctypes.data
        self.forward_program = Program(kernels.library, kernels.team)
        index_rows = {batch.token_ids.data_ptr(): num_rows, batch.positions.data_ptr(): num_rows}
        index_rows[batch.hidden_rows.data_ptr()] = builder.num_hidden_rows.ctypes.data
        with kernels.recording(self.forward_program, index_rows, num_seqs):
            hidden = model.forward(batch, kv_cache)
        max_num_seqs = len(batch.block_tables[0])
        self.max_logit_rows = max(MIN_LOGIT_ROWS, min(len(batch.token_ids), LOGIT_ROWS_PER_SEQ * max_num_seqs))
        self.logit_rows = torch.zeros(self.max_logit_rows, dtype=torch.int64)
        self.num_logit_rows = np.zeros(2, dtype=np.int64)  # RowCounts
        self.logits_program = Program(kernels.library, kernels.team)
        index_rows = {self.logit_rows.data_ptr(): self.num_logit_rows.ctypes.data}
        with kernels.recording(self.logits_program, index_rows):
            self.logits = model.compute_logits(hidden, self.logit_rows)
        self.hidden_program = Program(kernels.library, kernels.team)
        with kernels.recording(self.hidden_program, index_rows):
            self.hidden = model.compute_hidden(hidden, self.logit_rows)
        self.forward_program.keep.append(builder)
        self.plain_program = self.forward_program
        if any(linear.additions for linear in model.linears):
            # A call with nothing to do still costs a barrier of all threads.
            self.plain_program = self.forward_program.without("add_lora_")

    def forward(self, batch: BatchInputs) -> None:
        has_adapters = self.plain_program is not self.forward_program and bool(len(batch.lora_slots))
        (self.forward_program if has_adapters else self.plain_program).run()

    def compute_hidden(self, rows: Tensor) -> Tensor:
        return self._compute(self.hidden_program, self.hidden, rows)

    def compute_logits(self, rows: Tensor) -> Tensor:
        return self._compute(self.logits_program, self.logits, rows)

    def _compute(self, program: Program, out: Tensor, rows: Tensor) -> Tensor:
        """Return the rows that `program` writes to `out`, in pieces if they do not fit into the buffer.

        The rows that a step samples fit, unless it has long drafts.
        """
        if len(rows) > self.max_logit_rows:
            parts = torch.split(rows, self.max_logit_rows)
            return torch.cat([self._compute(program, out, some).clone() for some in parts])
        num_rows = len(rows)
        self.logit_rows[:num_rows] = rows
        self.num_logit_rows[:] = num_rows  # all count as rows of generated tokens
        program.run()
        return out[:num_rows]


def prepare_execution(kernels: Kernels, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> Execution:
    """Return the execution of a model for the batches of a builder, of the kind that its kernels need."""
    if isinstance(kernels, CpuKernels):
        return CpuExecution(kernels, model, kv_cache, builder)
    if kernels.is_graphed:
        execution: Execution = engine_part("triton", "cuda_graphs").prepare(model, kv_cache, builder)
        return execution
    return EagerExecution(model, kv_cache)
