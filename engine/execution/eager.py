"""Run a model operation by operation."""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.execution.observer import AttentionObserver
from engine.model.decoder import CausalLM
from engine.model.kv_cache import KVCache
from engine.model.observation import Observation, observe


class EagerExecution:
    """Runs the model's code for every batch."""

    def __init__(self, model: CausalLM, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.hidden: Tensor | None = None
        self.max_logit_rows = sys.maxsize
        self.uncaptured: list[int] = []

    def capture_next(self) -> None:
        """Do nothing: there are no graphs."""

    def forward(self, batch: BatchInputs) -> None:
        self.hidden = self.model.forward(batch, self.kv_cache)

    def compute_hidden(self, rows: Tensor) -> Tensor:
        assert self.hidden is not None
        return self.model.compute_hidden(self.hidden, rows)

    def compute_logits(self, rows: Tensor) -> Tensor:
        assert self.hidden is not None
        return self.model.compute_logits(self.hidden, rows)


class EagerObservedExecution(AttentionObserver):
    """Runs the model's code for every step."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.builder = builder

    def forward(self) -> Iterator[Observation]:
        batch = self.builder.current()
        self.model.extend_rotary(int(batch.seq_lens.max()))
        return observe(self.model, batch, self.kv_cache)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.model.compute_logits(hidden, torch.arange(len(hidden), device=hidden.device))
