"""Prepare a model to run on its kernels: operation by operation, as a recorded program, or in CUDA graphs."""

from __future__ import annotations

from engine.batch.builder import BatchBuilder
from engine.execution.eager import EagerExecution, EagerObservedExecution
from engine.execution.interface import Execution, ObservedExecution
from engine.kernels.interface import Kernels
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache
from engine.shared.parts import engine_part


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


def prepare_observed_execution(
    kernels: Kernels, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder
) -> ObservedExecution:
    """Return an execution of a model that shows what happens inside, for the batches of a builder of its own."""
    if kernels.execution == "program":
        from engine.execution.cpu_program import CpuObservedExecution
        from engine.kernels.cpu.kernels import CpuKernels

        assert isinstance(kernels, CpuKernels)
        return CpuObservedExecution(kernels, model, kv_cache, builder)
    return EagerObservedExecution(model, kv_cache, builder)
