"""Construction of `BatchInputs` from a `Step`, in buffers that live as long as the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch.inputs import AttentionPlanner, AttentionWork, BatchInputs, Lengths, StateMove
from engine.batch.transfer import packed_copy
from engine.scheduling.request import NO_LORA_SLOT, Request, Step

# Fields of BatchInputs that are rows of one buffer.
ROWS = (
    "token_ids",
    "positions",
    "lora_slots",
    "hidden_rows",
    "hidden_lora_slots",
    "sample_rows",
    "ahead_rows",
    "ahead_samples",
)


NewBuffer: TypeAlias = Callable[[tuple[int, ...]], NDArray[np.int64]]  # of a shape, zeroed


def zeros(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.zeros(shape, dtype=np.int64)


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold."""

    max_num_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    num_token_ids: int  # of the model


class BatchBuilder:
    """Fills buffers that each batch reuses."""

    def __init__(
        self,
        limits: BatchLimits,
        device: torch.device,
        *,
        num_groups: int = 1,
        planners: Sequence[AttentionPlanner] = (),
        new_buffer: NewBuffer = zeros,
        fill_states: Callable[[Step, Lengths], None] | None = None,
    ) -> None:
        """`num_groups`: number of KV groups; `planners`: of each kind of attention, if the kernels need work lists.

        `fill_states` fills in the `StateMove` of each sequence of a step, [S, 6]; None: the model has no states.

        `new_buffer` returns the buffers. Another process in which they are in the same memory may read each batch.
        """
        self.limits = limits
        self.block_size = limits.block_size
        self.planners = planners
        self.new_buffer = new_buffer
        self.device = device
        # Each holds two numbers: all rows, and the rows of generating requests, which come first.
        self.num_rows, self.num_hidden_rows = new_buffer((2, 2))
        self.num_seqs = new_buffer((1,))
        self.rows = new_buffer((len(ROWS), limits.max_num_tokens))
        self.lengths = new_buffer((len(ROWS),))  # of `rows`
        self.max_blocks = new_buffer((1,))  # of a sequence
        self.slot_mappings = new_buffer((num_groups, limits.max_num_tokens))
        self.sampled: dict[Request, int] = {}  # request -> index of its token among those sampled by the previous step
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self.tables = new_buffer((num_groups, limits.max_num_seqs, max_blocks))
        self.query_lens, self.hidden_lens, self.seq_lens = new_buffer((3, limits.max_num_seqs))
        self.fill_states = fill_states
        self.states = [] if fill_states is None else [new_buffer((limits.max_num_seqs, len(StateMove._fields)))]

    def smaller(self, max_num_tokens: int) -> BatchBuilder:
        """Return a builder with buffers of its own for batches of one sequence."""
        return BatchBuilder(
            replace(self.limits, max_num_tokens=max_num_tokens, max_num_seqs=1),
            self.device,
            num_groups=len(self.tables),
            planners=self.planners,
            new_buffer=self.new_buffer,
            fill_states=self.fill_states,
        )

    def buffers(self) -> BatchInputs:
        """Return the buffers at full length.

        On a CPU, every step's inputs are views of them, so a program recorded on these runs any step.
        """
        tensors = map(torch.from_numpy, (*self.rows, *self.slot_mappings, *self.tables, *self.states))
        return self._inputs(list(tensors), self.tables.shape[1])

    def build(self, step: Step) -> BatchInputs:
        """Return the inputs of a step. The next call overwrites the lengths and, on a CPU, the tensors.

        Raises ValueError for a token id that the model does not have.
        """
        self._fill(step)
        return self.current()

    def _fill(self, step: Step) -> None:
        """Write a step to the buffers, and to `lengths` how much of each it takes."""
        num_seqs = len(step.scheduled)
        self.query_lens[:num_seqs] = [item.num_tokens for item in step.scheduled]
        self.hidden_lens[:num_seqs] = [
            item.num_hidden if item.num_prompt_logprobs or item.request.params.pooling else item.num_samples
            for item in step.scheduled
        ]
        self.seq_lens[:num_seqs] = [item.start + item.num_tokens for item in step.scheduled]
        num_generating = sum([not item.is_prompt for item in step.scheduled])
        for counts, lens in ((self.num_rows, self.query_lens), (self.num_hidden_rows, self.hidden_lens)):
            counts[:] = lens[:num_seqs].sum(), lens[:num_generating].sum()
        num_rows, num_hidden_rows, self.num_seqs[0] = int(self.num_rows[0]), int(self.num_hidden_rows[0]), num_seqs
        rows = dict(zip(ROWS, self.rows, strict=True))
        rows["token_ids"][:num_rows] = list(itertools.chain.from_iterable(item.token_ids for item in step.scheduled))
        self._check_token_ids(rows["token_ids"][:num_rows])
        if with_next := [item for item in step.scheduled if item.num_prompt_logprobs]:
            next_ids = itertools.chain.from_iterable(item.next_prompt_ids for item in with_next)
            self._check_token_ids(np.fromiter(next_ids, np.int64))
        lora_slots = [item.request.lora_slot for item in step.scheduled]
        rows["lora_slots"][:num_rows] = np.repeat(lora_slots, self.query_lens[:num_seqs])
        rows["hidden_rows"][:num_hidden_rows] = last_rows(self.query_lens[:num_seqs], self.hidden_lens[:num_seqs])
        rows["hidden_lora_slots"][:num_hidden_rows] = np.repeat(lora_slots, self.hidden_lens[:num_seqs])
        sample_rows = last_rows(self.hidden_lens[:num_seqs], np.array([item.num_samples for item in step.scheduled]))
        rows["sample_rows"][: len(sample_rows)] = sample_rows
        num_ahead = self._fill_ahead(step, rows["ahead_rows"], rows["ahead_samples"])
        self.max_blocks[0] = self._fill_tables(step)
        if self.fill_states is not None:
            self.fill_states(step, self.states[0][:num_seqs])
        self._fill_positions(rows["positions"][:num_rows], num_seqs)
        has_adapters = max(lora_slots) != NO_LORA_SLOT
        lengths = [num_rows, num_rows, num_rows * has_adapters, num_hidden_rows, num_hidden_rows * has_adapters]
        self.lengths[:] = [*lengths, len(sample_rows), num_ahead, num_ahead]

    def _check_token_ids(self, token_ids: Lengths) -> None:
        smallest, largest = int(token_ids.min(initial=0)), int(token_ids.max(initial=0))
        if smallest < 0 or largest >= self.limits.num_token_ids:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"token id {wrong} is none of the model's {self.limits.num_token_ids}")

    def current(self) -> BatchInputs:
        """Return the inputs of the step that the buffers hold."""
        num_seqs, max_blocks, lengths = int(self.num_seqs[0]), int(self.max_blocks[0]), self.lengths.tolist()
        num_rows = lengths[0]
        parts = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        parts += [*self.slot_mappings[:, :num_rows], *self.tables[:, :num_seqs, :max_blocks]]
        parts += [moves[:num_seqs] for moves in self.states]
        work = [planner.plan(self.query_lens[:num_seqs], self.seq_lens[:num_seqs]) for planner in self.planners]
        num_parts = len(parts)
        parts += [some.table for some in work]
        is_shared = self.device.type == "cpu"
        tensors = [torch.from_numpy(part) for part in parts] if is_shared else packed_copy(parts, self.device)
        batch = self._inputs(tensors[:num_parts], num_seqs)
        pairs = zip(tensors[num_parts:], work, strict=True)
        batch.attention_work = [AttentionWork(table, some.num_partial_rows) for table, some in pairs]
        return batch

    def _inputs(self, tensors: Sequence[Tensor], num_seqs: int) -> BatchInputs:
        num_rows, num_groups = len(ROWS), len(self.tables)
        rows: dict[str, Any] = dict(zip(ROWS, tensors, strict=False))
        return BatchInputs(
            **rows,
            slot_mappings=list(tensors[num_rows : num_rows + num_groups]),
            block_tables=list(tensors[num_rows + num_groups : num_rows + 2 * num_groups]),
            query_lens=self.query_lens[:num_seqs],
            hidden_lens=self.hidden_lens[:num_seqs],
            seq_lens=self.seq_lens[:num_seqs],
            states=tensors[-1] if self.states else None,
        )

    def _fill_ahead(self, step: Step, rows: Lengths, samples: Lengths) -> int:
        """Fill ahead_rows and ahead_samples, and return their length."""
        first_rows = self.query_lens[: len(step.scheduled)].cumsum() - self.query_lens[: len(step.scheduled)]
        ahead = [index for index, item in enumerate(step.scheduled) if item.is_ahead]
        rows[: len(ahead)] = first_rows[ahead]
        samples[: len(ahead)] = [self.sampled[step.scheduled[index].request] for index in ahead]
        sampled = [item.request for item in step.scheduled for _ in range(item.num_samples)]
        self.sampled = {request: index for index, request in enumerate(sampled)}
        return len(ahead)

    def _fill_tables(self, step: Step) -> int:
        """Fill the block tables of all KV groups, and return the largest number of blocks of a sequence."""
        tables = (table for item in step.scheduled for table in item.request.kv.tables)
        max_blocks = max((len(table.block_ids) for table in tables), default=0)
        for index, item in enumerate(step.scheduled):
            for buffer, table in zip(self.tables, item.request.kv.tables, strict=True):
                num_blocks = len(table.block_ids)
                buffer[index, :num_blocks] = table.block_ids
                buffer[index, num_blocks:max_blocks] = 0
        return max_blocks

    def _fill_positions(self, positions: Lengths, num_seqs: int) -> None:
        """Fill positions and slot mappings from the lengths and the block tables."""
        query_lens, seq_lens, num_rows = self.query_lens[:num_seqs], self.seq_lens[:num_seqs], len(positions)
        sequences = np.repeat(np.arange(num_seqs), query_lens)
        # The last row of a sequence is its last token: position = row + seq_len - end of the sequence's rows.
        np.add(np.arange(num_rows), np.repeat(seq_lens - query_lens.cumsum(), query_lens), out=positions)
        blocks, offsets = np.divmod(positions, self.block_size)
        slots = self.tables[:, sequences, blocks] * self.block_size + offsets
        self.slot_mappings[:, :num_rows] = slots


def last_rows(lens: Lengths, nums: Lengths) -> Lengths:
    """Return the row indices of the last `nums[i]` rows of each run of `lens[i]` rows."""
    rows: Lengths = np.arange(nums.sum()) + np.repeat(lens.cumsum() - nums.cumsum(), nums)
    return rows
