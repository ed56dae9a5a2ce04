"""From a `Step` to the flat tensors that the model reads, in buffers that live as long as the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.request import Scheduled, Step


@dataclass(slots=True)
class BatchInputs:
    """One step's input. T rows (tokens) of S sequences lie one after the other; lengths also stay on the host."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block id * block size + offset, where the row's key and value go
    sample_rows: Tensor  # [R] int64: rows that yield a token
    block_tables: Tensor  # [S, max blocks of this step] int64, padded with block 0
    query_lens: list[int]  # [S] rows of each sequence
    seq_lens: list[int]  # [S] tokens of each sequence up to and including its last row here


class BatchBuilder:
    """Fills the buffers of a batch, which the next batch uses again."""

    def __init__(
        self, max_num_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        # One packed buffer for what has a value for each row, so that a device needs one copy.
        self.rows = np.zeros((4, max_num_tokens + 1), dtype=np.int64)
        self.tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int64)

    def build(self, step: Step) -> BatchInputs:
        row = num_samples = max_blocks = 0
        for index, item in enumerate(step.scheduled):
            block_ids = np.array([block.block_id for block in item.request.blocks], dtype=np.int64)
            self._fill_rows(item, row, block_ids)
            row += item.num_tokens
            self.rows[3, num_samples] = row - 1
            num_samples += item.samples
            self.tables[index, : len(block_ids)] = block_ids
            self.tables[index, len(block_ids) :] = 0
            max_blocks = max(max_blocks, len(block_ids))
        rows = torch.from_numpy(self.rows).to(self.device)
        return BatchInputs(
            token_ids=rows[0, :row],
            positions=rows[1, :row],
            slots=rows[2, :row],
            sample_rows=rows[3, :num_samples],
            block_tables=torch.from_numpy(self.tables[: len(step.scheduled), :max_blocks]).to(self.device),
            query_lens=[item.num_tokens for item in step.scheduled],
            seq_lens=[item.start + item.num_tokens for item in step.scheduled],
        )

    def _fill_rows(self, item: Scheduled, row: int, block_ids: npt.NDArray[np.int64]) -> None:
        start, end = item.start, item.start + item.num_tokens
        positions = np.arange(start, end)
        target = slice(row, row + item.num_tokens)
        self.rows[0, target] = item.request.token_ids[start:end]
        self.rows[1, target] = positions
        self.rows[2, target] = block_ids[positions // self.block_size] * self.block_size + positions % self.block_size
