"""What a process loads of a model: the whole. With tensor parallelism, a rank loads a part in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.batch.builder import NewBuffer, zeros
from engine.config import EngineConfig, ModelConfig
from engine.model import CausalLM, Parameters
from engine.model.linear import Linear
from engine.weights import Weight


class WholeModel:
    """A model in one process."""

    rank = 0
    num_ranks = 1
    new_adapters: Callable[[Sequence[Linear], int, int], Any] | None = None  # of a rank: makes its part of the adapters

    def __init__(self, config: ModelConfig, _path: Path) -> None:
        self.config = config
        self.new_buffer: NewBuffer = zeros

    def settings(self, config: EngineConfig) -> EngineConfig:
        return config

    def least(self, *numbers: int) -> list[int]:
        return list(numbers)

    def weights(self, weights: Iterable[tuple[str, Weight]], dtype: torch.dtype) -> Iterable[tuple[str, Weight]]:
        return weights

    def build(self, parameters: Parameters, **options: Any) -> CausalLM:
        return CausalLM(self.config, parameters, **options)
