"""Run decode steps, in which each sequence has one row, as CUDA graphs: one launch instead of hundreds.

A graph runs on fixed memory, so a batch is copied into the graph's buffers and padded to the next of a few sizes with
rows whose results are discarded. All other batches run operation by operation, with the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import triton
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.execution.eager import EagerExecution
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache
from engine.scheduling.request import NO_LORA_SLOT

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences
PAD_SLOT_ID = -1  # in the slot mapping: the row's key and value are not stored

Key: TypeAlias = tuple[int, int]  # number of sequences, segments of keys of the longest
Forward: TypeAlias = Callable[[], Tensor]


def capture(forward: Forward, pool: tuple[int, int] | None = None) -> Forward:
    """Return a function that replays what `forward` does on the device, in the same memory.

    `forward` runs once before the capture: kernels are compiled and libraries loaded on first use.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        out = forward()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class GraphedExecution(EagerExecution):
    """Captures the graph of a size when it is needed for the second time, so that no first token waits for it."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        builder: BatchBuilder,
        segment: int,
        capture: Callable[[Forward], Forward],
    ) -> None:
        super().__init__(model, kv_cache)
        self.segment = segment  # tokens
        self.capture: Callable[[Forward], Forward] | None = capture  # None after a capture has failed
        self.graphs: dict[Key, Forward] = {}
        self.seen_keys: set[Key] = set()
        max_num_seqs, max_blocks = builder.tables.shape
        size = next((size for size in SIZES if size >= max_num_seqs), SIZES[-1])
        self.rows = torch.zeros((4, size), dtype=torch.int64, device=builder.device)
        self.all_rows = torch.arange(size, device=builder.device)
        self.tables = torch.zeros((size, max_blocks), dtype=torch.int64, device=builder.device)

    def forward(self, batch: BatchInputs) -> None:
        graph = self._graph_of(batch)
        if graph is None:
            super().forward(batch)
        else:
            self.hidden = graph()

    def _graph_of(self, batch: BatchInputs) -> Forward | None:
        """Copy the batch into the buffers of its CUDA graph and return the graph; None if it must run without one."""
        key = self.key_of(batch)
        if key is None or self.capture is None:
            return None
        if key not in self.seen_keys:
            self.seen_keys.add(key)
            return None
        self._copy(batch, key[0])  # before the capture, which runs the model once
        if key not in self.graphs:
            self._add(key)
        return self.graphs.get(key)

    def key_of(self, batch: BatchInputs) -> Key | None:
        """Return the key of the graph that computes a batch; None if no graph can."""
        num_seqs = len(batch.query_lens)
        is_decode = len(batch.token_ids) == num_seqs == len(batch.hidden_rows) and bool((batch.query_lens == 1).all())
        if not is_decode or not 0 < num_seqs <= self.rows.shape[1]:
            return None
        num_segments = -(-int(batch.seq_lens.max()) // self.segment)
        return next(size for size in SIZES if size >= num_seqs), triton.next_power_of_2(num_segments)

    def _copy(self, batch: BatchInputs, size: int) -> None:
        num_seqs = len(batch.query_lens)
        rows = (batch.token_ids, batch.positions, batch.slot_mapping, batch.lora_slots)
        for row, values, padding in zip(self.rows, rows, (0, 0, PAD_SLOT_ID, NO_LORA_SLOT), strict=True):
            row[:num_seqs] = values
            row[num_seqs:size] = padding
        self.tables[:num_seqs, : batch.block_tables.shape[1]] = batch.block_tables

    def _add(self, key: Key) -> None:
        size, num_segments = key
        ones = np.ones(size, dtype=np.int64)
        token_ids, positions, slot_mapping, lora_slots = self.rows[:, :size]
        rows, tables = self.all_rows[:size], self.tables[:size]
        inputs = BatchInputs(
            token_ids,
            positions,
            slot_mapping,
            lora_slots,
            hidden_rows=rows,  # all
            hidden_lora_slots=lora_slots,
            sample_rows=rows,
            ahead_rows=rows[:0],
            ahead_samples=rows[:0],
            block_tables=tables,
            query_lens=ones,
            hidden_lens=ones,
            seq_lens=ones * num_segments * self.segment,
        )
        assert self.capture is not None
        try:
            self.graphs[key] = self.capture(lambda: self.model.forward(inputs, self.kv_cache))
        except RuntimeError as error:
            logger.warning("cannot capture a CUDA graph, steps take longer: %s", error)
            self.capture = None
