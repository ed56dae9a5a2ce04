"""Run decode steps, in which each sequence has one row, as CUDA graphs: one launch instead of hundreds.

A graph runs on fixed memory, so a batch is copied into the graph's buffers and padded to the next of a few sizes with
rows whose results are discarded. All other batches run operation by operation, with the same bits.

Graphs are captured before requests come, or when there are none, the largest first: the memory that its operations
take is enough for the others, so all graphs share it. Then come the smallest, whose steps gain most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import AttentionWork, BatchInputs, StateMove
from engine.execution import EagerExecution
from engine.model.decoder import CausalLM
from engine.model.layer_inputs import KVCache
from engine.model.memory_plan import MIB, free_memory
from engine.scheduling.request import NO_LORA_SLOT

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences
MAX_GRAPH_BYTES = 384 * MIB  # more is not captured: the memory plan reserves little for graphs
# Token id, position and LoRA slot of padding, then its slot in each KV group (keys and values are not stored).
PADDING, PADDING_SLOT = (0, 0, NO_LORA_SLOT), -1

Forward: TypeAlias = Callable[[], Tensor]


class CudaDevice:
    """Captures CUDA graphs on one stream into one memory pool, as sharing the memory requires."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0  # that the graphs take

    def capture(self, forward: Forward) -> Forward:
        """Return a function that replays what `forward` does on the device, in the same memory.

        It is run once before, since kernels are compiled and libraries loaded on first use. Raises RuntimeError if it
        cannot be captured.
        """
        num_free = free_memory(self.device)
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # here too, because torch stays on the stream if a capture fails
            forward()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                out = forward()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.num_bytes += num_free - free_memory(self.device)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class GraphedExecution(EagerExecution):
    """Runs a batch in the smallest captured graph that holds it, or operation by operation if there is none."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder, device: CudaDevice) -> None:
        super().__init__(model, kv_cache)
        self.device = device
        self.graphs: dict[tuple[int, bool], Forward] = {}  # by size, and whether any row has an adapter
        self.kinds = (False, True) if any(linear.additions for linear in model.linears) else (False,)  # of each size
        num_groups, max_num_seqs, max_blocks = builder.tables.shape
        self.padding = (*PADDING, *[PADDING_SLOT] * num_groups)
        largest = next((size for size in SIZES if size >= max_num_seqs), SIZES[-1])
        self.uncaptured = [*(size for size in reversed(SIZES) if size < largest), largest]  # the last one comes first
        self.max_model_len = max_blocks * builder.block_size
        # Each row begins at a multiple of 16 bytes, as in other steps: kernels are compiled for that.
        self.rows = torch.zeros((len(self.padding), largest + largest % 2), dtype=torch.int64, device=builder.device)
        self.all_rows = torch.arange(largest, device=builder.device)
        self.tables = torch.zeros((num_groups, largest, max_blocks), dtype=torch.int64, device=builder.device)
        # Where there are no rows, no state is written.
        self.states = torch.zeros((largest, len(StateMove._fields)), dtype=torch.int64, device=builder.device)
        self.planners = builder.planners
        tables = [planner.largest(largest, self.max_model_len).table for planner in self.planners]
        self.work = [torch.from_numpy(table).to(builder.device) for table in tables]

    def capture_next(self) -> None:
        """Capture the graphs of the next size. Without one, batches run in the next larger graph of their kind."""
        if not self.uncaptured:
            return
        size = self.uncaptured.pop()
        self._pad(0, size)  # the capture runs the model, and must not change what is cached
        for table in (*self.work, self.states):
            table.zero_()  # nor compute the attention of rows that this size does not have
        for is_adapted in self.kinds:
            forward = partial(self.model.forward, self._inputs(size, is_adapted), self.kv_cache)
            try:
                self.graphs[size, is_adapted] = self.device.capture(forward)
            except RuntimeError as error:
                kind = f" {'with' if is_adapted else 'without'} LoRA adapters" if len(self.kinds) > 1 else ""
                cause = first_cause(error)
                logger.warning("no CUDA graph for batches of %d%s, whose steps take longer: %s", size, kind, cause)
        num_mib = self.device.num_bytes // MIB
        if self.uncaptured and self.device.num_bytes > MAX_GRAPH_BYTES:
            sizes = sorted(self.uncaptured)
            logger.warning("CUDA graphs take %d MiB: no more are captured, for batches of %s", num_mib, sizes)
            self.uncaptured = []
        if not self.uncaptured:
            captured = ", ".join(map(str, sorted({size for size, _ in self.graphs})))
            logger.info("CUDA graphs: for batches of %s, %d MiB", captured, num_mib)

    def forward(self, batch: BatchInputs) -> None:
        size = self.size_of(batch)
        if size is None:
            super().forward(batch)
        else:
            self._copy(batch, size)
            self.hidden = self.graphs[size, has_adapters(batch)]()

    def size_of(self, batch: BatchInputs) -> int | None:
        """Return the size of the graph that computes a batch; None if no graph can."""
        num_seqs = len(batch.query_lens)
        is_decode = len(batch.token_ids) == num_seqs == len(batch.hidden_rows) and bool((batch.query_lens == 1).all())
        sizes = [size for size, is_adapted in self.graphs if size >= num_seqs > 0 and is_adapted == has_adapters(batch)]
        return min(sizes, default=None) if is_decode else None

    def _copy(self, batch: BatchInputs, size: int) -> None:
        num_seqs = len(batch.query_lens)
        rows = (batch.token_ids, batch.positions, batch.lora_slots, *batch.slot_mappings)
        for row, values in zip(self.rows, rows, strict=True):
            row[: len(values)] = values  # of LoRA slots, there may be none
        self._pad(num_seqs, size)
        for table, some in zip(self.tables, batch.block_tables, strict=True):
            table[:num_seqs, : some.shape[1]] = some
        for buffer, work in zip(self.work, batch.attention_work, strict=True):
            buffer[: len(work.table)] = work.table
        if batch.states is not None:
            self.states[:num_seqs] = batch.states
            self.states[num_seqs:size] = 0

    def _pad(self, first: int, last: int) -> None:
        for row, padding in zip(self.rows, self.padding, strict=True):
            row[first:last] = padding

    def _inputs(self, size: int, is_adapted: bool) -> BatchInputs:
        """Return the buffers of a graph as a batch."""
        ones = np.ones(size, dtype=np.int64)
        token_ids, positions, lora_slots, *slot_mappings = self.rows[:, :size]
        lora_slots = lora_slots[: size * is_adapted]
        rows = self.all_rows[:size]
        largest = [planner.largest(size, self.max_model_len) for planner in self.planners]
        return BatchInputs(
            token_ids,
            positions,
            lora_slots,
            hidden_rows=rows,  # all
            hidden_lora_slots=lora_slots,
            sample_rows=rows,
            ahead_rows=rows[:0],
            ahead_samples=rows[:0],
            slot_mappings=slot_mappings,
            block_tables=list(self.tables[:, :size]),
            query_lens=ones,
            hidden_lens=ones,
            seq_lens=ones,  # those of a batch are in its attention work
            attention_work=[
                AttentionWork(table[: len(some.table)], some.num_partial_rows)
                for table, some in zip(self.work, largest, strict=True)
            ],
            states=self.states[:size] if self.model.config.mixers else None,
        )


def has_adapters(batch: BatchInputs) -> bool:
    """Return whether any row has a LoRA adapter."""
    return len(batch.lora_slots) > 0


def first_cause(error: BaseException) -> str:
    """Return the first line of what went wrong first: an error in a capture is followed by that of ending it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def prepare(model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> GraphedExecution:
    """Return the execution of a model in CUDA graphs, for the batches of a builder."""
    return GraphedExecution(model, kv_cache, builder, CudaDevice(builder.device))
