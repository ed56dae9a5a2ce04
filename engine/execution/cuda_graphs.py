"""Steps in which each sequence has one row, as CUDA graphs: one launch where there were hundreds.

A graph runs on fixed memory, so a batch is copied into buffers of its own and filled up to the next of some sizes with
rows that are computed and thrown away. A batch of any other kind runs as ever, and with the same bits.
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
from engine.model import CausalLM
from engine.model.kv_cache import KVCache
from engine.scheduling.request import NO_PLACE

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences
NO_SLOT = -1  # where the keys of a row go that nobody reads

Key: TypeAlias = tuple[int, int]  # sequences, segments of keys of the longest
Forward: TypeAlias = Callable[[], Tensor]


def capture(forward: Forward, pool: tuple[int, int] | None = None) -> Forward:
    """What does the same as `forward` on the device, again and again in the same memory.

    `forward` runs once before: kernels are compiled and libraries loaded when they are first used.
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
    """Captures the graph of a size when that comes for the second time, so that nobody's first token waits for it."""

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
        self.capture: Callable[[Forward], Forward] | None = capture  # None: it has failed
        self.graphs: dict[Key, Forward] = {}
        self.met: set[Key] = set()
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
        """With the batch in its buffers; None where there is none."""
        key = self.key_of(batch)
        if key is None or self.capture is None:
            return None
        if key not in self.met:
            self.met.add(key)
            return None
        self._copy(batch, key[0])  # first, for to capture runs it once
        if key not in self.graphs:
            self._add(key)
        return self.graphs.get(key)

    def key_of(self, batch: BatchInputs) -> Key | None:
        """Which graph computes a batch; None where none does."""
        num_seqs = len(batch.query_lens)
        is_decode = len(batch.token_ids) == num_seqs == len(batch.hidden_rows) and bool((batch.query_lens == 1).all())
        if not is_decode or not 0 < num_seqs <= self.rows.shape[1]:
            return None
        num_segments = -(-int(batch.seq_lens.max()) // self.segment)
        return next(size for size in SIZES if size >= num_seqs), triton.next_power_of_2(num_segments)

    def _copy(self, batch: BatchInputs, size: int) -> None:
        num_seqs = len(batch.query_lens)
        rows = (batch.token_ids, batch.positions, batch.slots, batch.lora_places)
        for row, values, padding in zip(self.rows, rows, (0, 0, NO_SLOT, NO_PLACE), strict=True):
            row[:num_seqs] = values
            row[num_seqs:size] = padding
        self.tables[:num_seqs, : batch.block_tables.shape[1]] = batch.block_tables

    def _add(self, key: Key) -> None:
        size, num_segments = key
        ones = np.ones(size, dtype=np.int64)
        token_ids, positions, slots, lora_places = self.rows[:, :size]
        rows, tables = self.all_rows[:size], self.tables[:size]
        inputs = BatchInputs(
            token_ids,
            positions,
            slots,
            lora_places,
            hidden_rows=rows,  # all
            hidden_lora_places=lora_places,
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
            logger.warning("no CUDA graphs, steps take longer: %s", error)
            self.capture = None
