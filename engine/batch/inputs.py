"""The flat tensors that the model reads in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Lengths: TypeAlias = NDArray[np.int64]  # [S]


@dataclass(slots=True)
class BatchInputs:
    """One step's input. T rows (tokens) of S sequences lie one after the other; lengths also stay on the host."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block id * block size + offset, where the row's key and value go
    lora_places: Tensor  # [T] int64: where the row's LoRA adapter lies, -1: nowhere
    hidden_rows: Tensor  # [L] int64: rows whose last hidden state is wanted
    hidden_lora_places: Tensor  # [L] int64: lora_places of these
    sample_rows: Tensor  # [R] int64: which of hidden_rows yield a token
    ahead_rows: Tensor  # [A] int64: rows that read what the step before samples
    ahead_samples: Tensor  # [A] int64: ... which of its R tokens
    block_tables: Tensor  # [S, max blocks of this step] int64, padded with block 0
    query_lens: Lengths  # rows of each sequence
    hidden_lens: Lengths  # how many of them, counted from the last, are among hidden_rows
    seq_lens: Lengths  # tokens of each sequence up to and including its last row here
