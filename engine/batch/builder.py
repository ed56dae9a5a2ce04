"""Lay a `Step` out as flat tensors, in buffers that live as long as the engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.batch.transfer import packed_copy
from engine.scheduling.request import Request, Step


class BatchBuilder:
    """Fills the buffers of a batch, which the next batch uses again."""

    def __init__(
        self, max_num_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        # Of rows: how many, and how many of these are of generated tokens, which come first.
        self.num_rows, self.num_hidden_rows = np.zeros((2, 2), dtype=np.int64)
        self.num_seqs = np.zeros(1, dtype=np.int64)
        self.rows = np.zeros((9, max_num_tokens), dtype=np.int64)
        self.sampled: dict[Request, int] = {}  # in the step before: which of its tokens is whose
        self.tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self.query_lens, self.hidden_lens, self.seq_lens = np.zeros((3, max_num_seqs), dtype=np.int64)

    def buffers(self) -> BatchInputs:
        """All of the buffers, on a CPU: what batches of any size are part of."""
        return self._inputs([*torch.from_numpy(self.rows), torch.from_numpy(self.tables)], len(self.tables))

    def build(self, step: Step) -> BatchInputs:
        """What the lengths and the buffers of a CPU hold is overwritten by the next call."""
        num_seqs = len(step.scheduled)
        self.query_lens[:num_seqs] = [item.num_tokens for item in step.scheduled]
        self.hidden_lens[:num_seqs] = [item.num_hidden for item in step.scheduled]
        self.seq_lens[:num_seqs] = [item.start + item.num_tokens for item in step.scheduled]
        num_generating = sum(not item.is_prompt for item in step.scheduled)
        for counts, lens in ((self.num_rows, self.query_lens), (self.num_hidden_rows, self.hidden_lens)):
            counts[:] = lens[:num_seqs].sum(), lens[:num_generating].sum()
        num_rows, num_hidden_rows, self.num_seqs[0] = int(self.num_rows[0]), int(self.num_hidden_rows[0]), num_seqs
        self.rows[0, :num_rows] = list(itertools.chain.from_iterable(item.token_ids for item in step.scheduled))
        lora_places = [item.request.lora_place for item in step.scheduled]
        self.rows[3, :num_rows] = np.repeat(lora_places, self.query_lens[:num_seqs])
        self.rows[4, :num_hidden_rows] = last_rows(self.query_lens[:num_seqs], self.hidden_lens[:num_seqs])
        self.rows[5, :num_hidden_rows] = np.repeat(lora_places, self.hidden_lens[:num_seqs])
        sample_rows = last_rows(self.hidden_lens[:num_seqs], np.array([item.num_samples for item in step.scheduled]))
        self.rows[6, : len(sample_rows)] = sample_rows
        num_ahead = self._fill_ahead(step)
        max_blocks = self._fill_tables(step)
        self._fill_positions(num_rows, num_seqs)
        lengths = (*[num_rows] * 4, *[num_hidden_rows] * 2, len(sample_rows), num_ahead, num_ahead)
        parts = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        parts.append(self.tables[:num_seqs, :max_blocks])
        is_shared = self.device.type == "cpu"
        tensors = [torch.from_numpy(part) for part in parts] if is_shared else packed_copy(parts, self.device)
        return self._inputs(tensors, num_seqs)

    def _inputs(self, tensors: Sequence[Tensor], num_seqs: int) -> BatchInputs:
        token_ids, positions, slots, lora_places, *others, tables = tensors
        hidden_rows, hidden_lora_places, sample_rows, ahead_rows, ahead_samples = others
        return BatchInputs(
            token_ids,
            positions,
            slots,
            lora_places,
            hidden_rows,
            hidden_lora_places,
            sample_rows,
            ahead_rows,
            ahead_samples,
            tables,
            query_lens=self.query_lens[:num_seqs],
            hidden_lens=self.hidden_lens[:num_seqs],
            seq_lens=self.seq_lens[:num_seqs],
        )

    def _fill_ahead(self, step: Step) -> int:
        """Returns how many rows read what the step before samples."""
        first_rows = self.query_lens[: len(step.scheduled)].cumsum() - self.query_lens[: len(step.scheduled)]
        ahead = [index for index, item in enumerate(step.scheduled) if item.is_ahead]
        self.rows[7, : len(ahead)] = first_rows[ahead]
        self.rows[8, : len(ahead)] = [self.sampled[step.scheduled[index].request] for index in ahead]
        sampled = [item.request for item in step.scheduled for _ in range(item.num_samples)]
        self.sampled = {request: index for index, request in enumerate(sampled)}
        return len(ahead)

    def _fill_tables(self, step: Step) -> int:
        """Returns the largest number of blocks."""
        max_blocks = 0
        for index, item in enumerate(step.scheduled):
            blocks = item.request.blocks
            self.tables[index, : len(blocks)] = [block.block_id for block in blocks]
            self.tables[index, len(blocks) :] = 0
            max_blocks = max(max_blocks, len(blocks))
        return max_blocks

    def _fill_positions(self, num_rows: int, num_seqs: int) -> None:
        """Positions and slots of all rows, from the lengths and the tables."""
        query_lens, seq_lens = self.query_lens[:num_seqs], self.seq_lens[:num_seqs]
        sequences = np.repeat(np.arange(num_seqs), query_lens)
        positions = self.rows[1, :num_rows]
        # A row's position counts back from the end of its sequence as the row does from the end of its rows.
        np.add(np.arange(num_rows), np.repeat(seq_lens - query_lens.cumsum(), query_lens), out=positions)
        blocks, offsets = np.divmod(positions, self.block_size)
        np.add(self.tables[sequences, blocks] * self.block_size, offsets, out=self.rows[2, :num_rows])


def last_rows(lens: Lengths, nums: Lengths) -> Lengths:
    """Of runs of so many rows, one after the other, the last few of each: where they are."""
    rows: Lengths = np.arange(nums.sum()) + np.repeat(lens.cumsum() - nums.cumsum(), nums)
    return rows
