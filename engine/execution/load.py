"""Make a model ready to run step after step, in the way that suits its kernels."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.execution.eager import EagerExecution
from engine.kernels.interface import Kernels
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache


class Execution(Protocol):
    """A model made ready to run step after step in the same buffers."""

    def forward(self, batch: BatchInputs) -> None:
        """Compute the last hidden states of the batch's `hidden_rows`, and store every row's keys and values."""
        ...

    def compute_hidden(self, rows: Tensor) -> Tensor:
        """The last hidden states [R, hidden_size] of some (int64 [R]) of the last batch's `hidden_rows`, normalised.

        Until the next call.
        """
        ...

    def compute_logits(self, rows: Tensor) -> Tensor:
        """float32 logits [R, V] of some (int64 [R]) of the last batch's `hidden_rows`, until the next call."""
        ...


def prepare_execution(kernels: Kernels, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> Execution:
    """Make a model ready to run on the batches of a builder."""
    if kernels.execution == "program":
        from engine.execution.cpu_program import CpuExecution
        from engine.kernels.cpu.kernels import CpuKernels

        assert isinstance(kernels, CpuKernels)
        return CpuExecution(kernels, model, kv_cache, builder)
    if kernels.execution == "cuda_graphs":
        from engine.execution.cuda_graphs import GraphedExecution, capture
        from engine.kernels.triton.kernels import TritonKernels

        assert isinstance(kernels, TritonKernels)
        capture_in_pool = partial(capture, pool=torch.cuda.graph_pool_handle())
        return GraphedExecution(model, kv_cache, builder, kernels.tiles.attention.segment, capture_in_pool)
    return EagerExecution(model, kv_cache)
