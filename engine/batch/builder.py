"""Construction of `BatchInputs` from a `Step`, in buffers that live as long as the engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch.inputs import AttentionPlanner, BatchInputs, Lengths
from engine.batch.transfer import packed_copy
from engine.scheduling.request import NO_LORA_SLOT, Request, Step


class BatchBuilder:
    """Fills buffers that each batch reuses."""

    def __init__(
        self,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        planner: AttentionPlanner | None = None,
    ) -> None:
        self.block_size = block_size
        self.planner = planner
        self.device = device
        # Each holds two numbers: all rows, and the rows of generating requests, which come first.
        self.num_rows, self.num_hidden_rows = np.zeros((2, 2), dtype=np.int64)
        self.num_seqs = np.zeros(1, dtype=np.int64)
        self.rows = np.zeros((9, max_num_tokens), dtype=np.int64)
        self.sampled: dict[Request, int] = {}  # request -> index of its token among those sampled by the previous step
        self.tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self.query_lens, self.hidden_lens, self.seq_lens = np.zeros((3, max_num_seqs), dtype=np.int64)

    def buffers(self) -> BatchInputs:
        """Return the buffers at full length.

        On a CPU, every step's inputs are views of them, so a program recorded on these runs any step.
        """
        return self._inputs([*torch.from_numpy(self.rows), torch.from_numpy(self.tables)], len(self.tables))

    def build(self, step: Step) -> BatchInputs:
        """Return the inputs of a step. The next call overwrites the lengths and, on a CPU, the tensors."""
        num_seqs = len(step.scheduled)
        self.query_lens[:num_seqs] = [item.num_tokens for item in step.scheduled]
        self.hidden_lens[:num_seqs] = [item.num_hidden for item in step.scheduled]
        self.seq_lens[:num_seqs] = [item.start + item.num_tokens for item in step.scheduled]
        num_generating = sum(not item.is_prompt for item in step.scheduled)
        for counts, lens in ((self.num_rows, self.query_lens), (self.num_hidden_rows, self.hidden_lens)):
            counts[:] = lens[:num_seqs].sum(), lens[:num_generating].sum()
        num_rows, num_hidden_rows, self.num_seqs[0] = int(self.num_rows[0]), int(self.num_hidden_rows[0]), num_seqs
        self.rows[0, :num_rows] = list(itertools.chain.from_iterable(item.token_ids for item in step.scheduled))
        lora_slots = [item.request.lora_slot for item in step.scheduled]
        self.rows[3, :num_rows] = np.repeat(lora_slots, self.query_lens[:num_seqs])
        self.rows[4, :num_hidden_rows] = last_rows(self.query_lens[:num_seqs], self.hidden_lens[:num_seqs])
        self.rows[5, :num_hidden_rows] = np.repeat(lora_slots, self.hidden_lens[:num_seqs])
        sample_rows = last_rows(self.hidden_lens[:num_seqs], np.array([item.num_samples for item in step.scheduled]))
        self.rows[6, : len(sample_rows)] = sample_rows
        num_ahead = self._fill_ahead(step)
        max_blocks = self._fill_tables(step)
        self._fill_positions(num_rows, num_seqs)
        has_adapters = max(lora_slots) != NO_LORA_SLOT
        lengths = (*[num_rows] * 3, num_rows * has_adapters, num_hidden_rows, num_hidden_rows * has_adapters)
        lengths += (len(sample_rows), num_ahead, num_ahead)
        parts = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        parts.append(self.tables[:num_seqs, :max_blocks])
        work = self.planner and self.planner.plan(self.query_lens[:num_seqs], self.seq_lens[:num_seqs])
        parts += [work.table] if work else []
        is_shared = self.device.type == "cpu"
        tensors = [torch.from_numpy(part) for part in parts] if is_shared else packed_copy(parts, self.device)
        batch = self._inputs(tensors[: len(lengths) + 1], num_seqs)
        if work:
            batch.attention_work, batch.num_partial_rows = tensors[-1], work.num_partial_rows
        return batch

    def _inputs(self, tensors: Sequence[Tensor], num_seqs: int) -> BatchInputs:
        token_ids, positions, slot_mapping, lora_slots, *others, tables = tensors
        hidden_rows, hidden_lora_slots, sample_rows, ahead_rows, ahead_samples = others
        return BatchInputs(
            token_ids,
            positions,
            slot_mapping,
            lora_slots,
            hidden_rows,
            hidden_lora_slots,
            sample_rows,
            ahead_rows,
            ahead_samples,
            tables,
            query_lens=self.query_lens[:num_seqs],
            hidden_lens=self.hidden_lens[:num_seqs],
            seq_lens=self.seq_lens[:num_seqs],
        )

    def _fill_ahead(self, step: Step) -> int:
        """Fill ahead_rows and ahead_samples, and return their length."""
        first_rows = self.query_lens[: len(step.scheduled)].cumsum() - self.query_lens[: len(step.scheduled)]
        ahead = [index for index, item in enumerate(step.scheduled) if item.is_ahead]
        self.rows[7, : len(ahead)] = first_rows[ahead]
        self.rows[8, : len(ahead)] = [self.sampled[step.scheduled[index].request] for index in ahead]
        sampled = [item.request for item in step.scheduled for _ in range(item.num_samples)]
        self.sampled = {request: index for index, request in enumerate(sampled)}
        return len(ahead)

    def _fill_tables(self, step: Step) -> int:
        """Fill the block tables, and return the largest number of blocks of a sequence."""
        max_blocks = 0
        for index, item in enumerate(step.scheduled):
            block_ids = item.request.kv.block_ids
            self.tables[index, : len(block_ids)] = block_ids
            self.tables[index, len(block_ids) :] = 0
            max_blocks = max(max_blocks, len(block_ids))
        return max_blocks

    def _fill_positions(self, num_rows: int, num_seqs: int) -> None:
        """Fill positions and slot_mapping from the lengths and the block tables."""
        query_lens, seq_lens = self.query_lens[:num_seqs], self.seq_lens[:num_seqs]
        sequences = np.repeat(np.arange(num_seqs), query_lens)
        positions = self.rows[1, :num_rows]
        # The last row of a sequence is its last token: position = row + seq_len - end of the sequence's rows.
        np.add(np.arange(num_rows), np.repeat(seq_lens - query_lens.cumsum(), query_lens), out=positions)
        blocks, offsets = np.divmod(positions, self.block_size)
        np.add(self.tables[sequences, blocks] * self.block_size, offsets, out=self.rows[2, :num_rows])


def last_rows(lens: Lengths, nums: Lengths) -> Lengths:
    """Return the row indices of the last `nums[i]` rows of each run of `lens[i]` rows."""
    rows: Lengths = np.arange(nums.sum()) + np.repeat(lens.cumsum() - nums.cumsum(), nums)
    return rows
