"""What a process loads of a model: the whole, without adapters.

With tensor parallelism, a rank loads a part in its place. The part `lora` loads adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.batch.builder import NewBuffer, zeros
from engine.config import EngineConfig, ModelConfig
from engine.model import CausalLM, Parameters
from engine.model.linear import Linear
from engine.scheduling.request import NO_LORA_SLOT
from engine.shared.messages import LoraAdapter
from engine.shared.parts import engine_part
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


class AdapterGoneError(LookupError):
    """No slot holds the weights that a request was admitted for."""


class Adapters:
    """The adapters of a model without adapters."""

    max_loras = 0
    max_rank = 0
    num_slots = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, in use or not."""
        return 0

    def loaded(self) -> list[LoraAdapter]:
        """Return the loaded adapters, in the order in which they were loaded."""
        return []

    def find(self, fingerprint: str) -> int:
        """Return the slot with these weights, NO_LORA_SLOT for an empty fingerprint. Raises AdapterGoneError."""
        if fingerprint:
            raise AdapterGoneError(fingerprint)
        return NO_LORA_SLOT

    def check(self, slot: int, fingerprint: str) -> None:
        """Check that a slot still holds the weights that `find` found there. Raises AdapterGoneError."""


class AdapterLoader:
    """Loads the adapters of the settings, of which there are none."""

    def check_memory(self, config: ModelConfig, itemsize: int, free: int) -> None:
        """Check that the slots of a model fit in the free memory, in bytes. Raises ValueError."""

    def load(self, part: WholeModel, model: CausalLM) -> Adapters:
        """Load the adapters of a model, of which this process has a part."""
        return Adapters()


def adapter_loader(config: EngineConfig, model_config: ModelConfig) -> AdapterLoader:
    """Return what loads the adapters of the settings, whose files it reads. Raises ValueError."""
    if not config.max_loras:
        return AdapterLoader()
    loader: AdapterLoader = engine_part("lora", "slots").LoraLoader(config, model_config)
    return loader
