"""The tensors that the model reads in one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Lengths: TypeAlias = NDArray[np.int64]  # [S]


class WorkList(NamedTuple):
    """What the programs of attention on a GPU compute, as in `engine.parts.triton.attention_plan`."""

    table: NDArray[np.int64]
    num_partial_rows: int  # of results that wait to be merged


class AttentionWork(NamedTuple):
    """A work list on the device."""

    table: Tensor
    num_partial_rows: int


class AttentionPlanner(Protocol):
    """Makes the work lists of one kind of attention, for kernels that find there what to compute."""

    def plan(self, query_lens: Lengths, seq_lens: Lengths) -> WorkList:
        """Return the work list of the last `query_lens` rows of each sequence."""

    def largest(self, num_seqs: int, max_model_len: int) -> WorkList:
        """Return an empty work list that has room for any step in which each of `num_seqs` sequences has one row."""


MAX_DRAFTED = 8  # rows of a draft that a state has room for, as in mixers.h


class StateMove(NamedTuple):
    """What a sequence of a step does to its state, in models that have states. The C++ kernels have the same struct.

    The block of a state holds that of one sequence in all layers.
    """

    first_row: int  # of the batch
    num_rows: int
    num_drafts: int  # last rows, whose state is not kept
    num_replayed: int  # accepted rows of the last draft, by which the state is advanced before its own rows
    source: int  # block of the state before; -1: there is none
    target: int  # block of the state after, another one


@dataclass(slots=True)
class BatchInputs:
    """The input of one step: T rows (tokens) of S sequences, one sequence after the other. Lengths are on the host."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    lora_slots: Tensor  # [T] int64: slot of the row's LoRA adapter, -1: none; empty if no row has one
    hidden_rows: Tensor  # [L] int64: rows whose last hidden state is needed
    hidden_lora_slots: Tensor  # [L] int64: lora_slots of hidden_rows
    sample_rows: Tensor  # [R] int64: indices into hidden_rows of the rows to sample from
    ahead_rows: Tensor  # [A] int64: rows that read a token sampled by the previous step
    ahead_samples: Tensor  # [A] int64: ... its index among the R tokens of that step
    slot_mappings: list[Tensor]  # of each KV group, [T] int64: slot of the row's key and value, see `rope_and_store_kv`
    block_tables: list[Tensor]  # of each KV group, [S, max blocks of this step] int64, padded with block 0
    query_lens: Lengths  # number of rows of each sequence
    hidden_lens: Lengths  # number of trailing rows of each sequence that are in hidden_rows
    seq_lens: Lengths  # number of tokens of each sequence up to and including its last row
    attention_work: list[AttentionWork] = field(default_factory=list)  # of `query_lens`, for each kind of attention
    states: Tensor | None = None  # of models that have states, [S, 6] int64: the `StateMove` of each sequence
