"""Run a model as recorded programs: one computes the hidden states of a batch, two more the logits or norms of rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.library import Program
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache

LOGIT_ROWS_PER_SEQ = 8  # a sampled token and its draft
MIN_LOGIT_ROWS = 64


class CpuExecution:
    """Owns the programs of a model. They read the batch from the builder's buffers."""

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
        self.uncaptured: list[int] = []

    def capture_next(self) -> None:
        """Do nothing: there are no graphs."""

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
